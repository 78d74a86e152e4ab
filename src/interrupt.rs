//! Ctrl-C and SIGTERM: the first ends the work at the next good place, the second at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether somebody asked to stop.
#[derive(Debug, Clone)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> io::Result<Self> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGINT, SIGTERM] {
            let asked = Arc::new(AtomicBool::new(false));
            // in this order: the first signal finds `asked` unset, the second ends the process
            flag::register_conditional_shutdown(number, exit_code(number as usize).into(), asked.clone())?;
            flag::register(number, asked)?;
            flag::register_usize(number, signal.clone(), number as usize)?;
        }
        Ok(Self { signal })
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
