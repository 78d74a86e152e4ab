//! Libraries that panic on some broken files. To a user these are broken files, not bugs of the program.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });

/// Runs a library's code on what a stranger wrote. A panic there becomes an error with its message, and is not printed.
pub(crate) fn unpanicked<T, E: ToString>(run: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                hook(info);
            }
        }));
    });
    QUIET.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    result.map_err(message)?.map_err(|e| e.to_string())
}

fn message(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it holds something impossible").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        assert_eq!(unpanicked(|| Ok::<_, String>(1)), Ok(1));
        assert_eq!(unpanicked(|| Err::<(), _>("no")), Err("no".into()));
        let broken = [1, 2];
        let index = std::hint::black_box(5);
        let panicked = unpanicked(|| Ok::<_, String>(broken[index])).expect_err("out of bounds");
        assert!(panicked.contains("index out of bounds"), "{panicked}");
    }
}
