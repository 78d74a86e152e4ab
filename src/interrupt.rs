//! Ctrl-C and SIGTERM: the first ends the work at the next good place, the second at once. While there is nothing to save
//! the first does too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether somebody asked to stop.
#[derive(Debug, Clone)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
    /// The next signal ends the process.
    at_once: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens from now on, with nothing to save yet.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> io::Result<Self> {
        let (signal, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        for number in [SIGINT, SIGTERM] {
            // in this order: the first signal finds `at_once` unset, the second ends the process
            flag::register_conditional_shutdown(number, exit_code(number as usize).into(), at_once.clone())?;
            flag::register(number, at_once.clone())?;
            flag::register_usize(number, signal.clone(), number as usize)?;
        }
        Ok(Self { signal, at_once })
    }

    /// From now on there is something to save: the first signal is only noted.
    pub fn save_first(&self) {
        self.at_once.store(false, Ordering::Relaxed);
    }

    /// From now on there is nothing to save again: the next signal ends the process. One that came before is still noted.
    pub fn saved(&self) {
        self.at_once.store(true, Ordering::Relaxed);
    }

    /// The exit code to stop with, if somebody asked: 130 for Ctrl-C, 143 for SIGTERM.
    #[must_use]
    pub fn asked(&self) -> Option<u8> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(exit_code(signal)),
        }
    }
}

fn exit_code(signal: usize) -> u8 {
    128 + signal as u8
}
