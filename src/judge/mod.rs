//! Which of two answers is better: judges, their verdicts, and what these come to.
//!
//! | file | what is there |
//! |---|---|
//! | `readability` | a judge that needs no model |
//! | `prompt` | what a model is asked, built in or of one's own |
//! | `verdict` | what it said |
//! | `endpoint` | one call of a model, and what its answer means |
//! | `pace` | how many calls at once, and how many a minute |
//! | `ask` | all calls of a comparison |
//! | `log` | what it was paid for, on disk |
//! | `outputs` | files of answers |
//! | `report` | `win_rate.json` |

pub mod ask;
pub mod config;
pub mod endpoint;
pub mod log;
pub mod outputs;
pub mod pace;
pub mod prompt;
pub mod readability;
pub mod report;
pub mod verdict;

pub use config::{Calls, EndpointJudge, Judge, JudgeConfig, Price};
