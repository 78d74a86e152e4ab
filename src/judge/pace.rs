//! How many calls are made at once, and how many a minute.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::config::Calls;

const MINUTE: Duration = Duration::from_secs(60);
/// How often a caller who waits looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);
/// After so many calls in a row that went well, one more is made at once.
const GOOD: u32 = 20;

/// Who may call now.
#[derive(Debug)]
pub struct Pace {
    most: usize,
    rpm: usize,
    tpm: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Calls that may be made at once: fewer where the endpoint has asked for that.
    limit: usize,
    going: usize,
    good: u32,
    /// Calls of the last minute, with their tokens.
    recent: VecDeque<(Instant, u64)>,
    /// Nobody calls before.
    hold: Option<Instant>,
}

/// A call that is being made; it counts until this is dropped.
#[derive(Debug)]
pub struct Turn<'p>(&'p Pace);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.state().going -= 1;
        self.0.changed.notify_all();
    }
}

impl Pace {
    /// As an endpoint is to be called.
    #[must_use]
    pub fn new(calls: &Calls) -> Self {
        let state = State { limit: calls.concurrency, going: 0, good: 0, recent: VecDeque::new(), hold: None };
        Self {
            most: calls.concurrency,
            rpm: calls.rpm.map_or(usize::MAX, |rpm| rpm as usize),
            tpm: calls.tpm.map_or(u64::MAX, u64::from),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a call of about so many tokens may be made; none where `stop` says that nobody wants it any more.
    pub fn turn(&self, tokens: u64, stop: impl Fn() -> bool) -> Option<Turn<'_>> {
        let mut state = self.state();
        loop {
            if stop() {
                return None;
            }
            let now = Instant::now();
            if state.may_call(self, tokens, now) {
                state.going += 1;
                state.recent.push_back((now, tokens));
                return Some(Turn(self));
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A call went well. `hold` are seconds that the endpoint wants to have quiet.
    pub fn went_well(&self, hold: Option<f64>) {
        let mut state = self.state();
        state.good += 1;
        if state.good >= GOOD {
            state.good = 0;
            state.limit = (state.limit + 1).min(self.most);
        }
        state.hold_for(hold);
    }

    /// The endpoint asks for fewer calls. Who was refused waits; the others go on, half as many at once.
    pub fn too_many(&self) {
        let mut state = self.state();
        state.good = 0;
        state.limit = (state.limit / 2).max(1);
    }

    /// Calls that may be made at once now.
    #[cfg(test)]
    fn limit(&self) -> usize {
        self.state().limit
    }
}

impl State {
    fn may_call(&mut self, pace: &Pace, tokens: u64, now: Instant) -> bool {
        if self.hold.is_some_and(|until| now < until) || self.going >= self.limit {
            return false;
        }
        while self.recent.front().is_some_and(|(at, _)| now.duration_since(*at) >= MINUTE) {
            self.recent.pop_front();
        }
        let taken: u64 = self.recent.iter().map(|(_, tokens)| tokens).sum();
        // one that is larger than a minute's tokens is made alone
        self.recent.len() < pace.rpm && (self.recent.is_empty() || taken.saturating_add(tokens) <= pace.tpm)
    }

    fn hold_for(&mut self, seconds: Option<f64>) {
        if let Some(seconds) = seconds {
            self.hold = self.hold.max(Instant::now().checked_add(Duration::from_secs_f64(seconds)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(concurrency: usize, rpm: Option<u32>, tpm: Option<u32>) -> Pace {
        Pace::new(&Calls { concurrency, rpm, tpm, ..Calls::of("http://x", None) })
    }

    /// Whether a call may be made now.
    fn free(pace: &Pace, tokens: u64) -> bool {
        let now = Instant::now();
        pace.state().may_call(pace, tokens, now)
    }

    #[test]
    fn calls_at_once_are_halved_and_grow_again() {
        let pace = pace(8, None, None);
        let turns: Vec<Turn<'_>> = (0..8).map(|_| pace.turn(1, || false).expect("a turn")).collect();
        assert!(!free(&pace, 1) && pace.turn(1, || true).is_none());
        drop(turns);
        pace.too_many();
        assert_eq!(pace.limit(), 4);
        (0..3).for_each(|_| pace.too_many());
        assert_eq!(pace.limit(), 1);
        (0..60).for_each(|_| pace.went_well(None));
        assert_eq!(pace.limit(), 4);
        (0..400).for_each(|_| pace.went_well(None));
        assert_eq!(pace.limit(), 8);
    }

    #[test]
    fn no_more_calls_or_tokens_a_minute_than_asked() {
        let calls = pace(8, Some(2), None);
        drop(calls.turn(1, || false));
        drop(calls.turn(1, || false));
        assert!(!free(&calls, 1));
        let later = Instant::now() + MINUTE;
        assert!(calls.state().may_call(&calls, 1, later));

        let tokens = pace(8, None, Some(100));
        assert!(free(&tokens, 1000), "one that is too large is made alone");
        drop(tokens.turn(60, || false));
        assert!(free(&tokens, 40) && !free(&tokens, 41));
    }

    #[test]
    fn nobody_calls_while_the_endpoint_wants_quiet() {
        let pace = pace(8, None, None);
        pace.went_well(Some(30.0));
        assert!(!free(&pace, 1));
        let later = Instant::now() + Duration::from_secs(31);
        assert!(pace.state().may_call(&pace, 1, later));
    }
}
