//! The reference's log-probs before the first update: from a cache and into it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::DType;
use serde_json::{Value, json};

use super::super::{Failure, failed, user_cache};
use super::prepare::Prepared;
use crate::data::Dataset;
use crate::interrupt::Interrupt;
use crate::progress::{Bar, Console, duration, short, thousands};
use crate::train::Trainer;
use crate::train::reference::{self, CachePlace, Entry, ReferenceCache};

/// How long a killed pass may have worked for nothing.
const KEEP_EVERY: Duration = Duration::from_secs(5);
/// Cached examples that are computed again before the rest is believed.
const CHECKED: usize = 4;

/// Where the reference came from.
#[derive(Debug, Clone)]
pub(super) struct Report {
    cached: usize,
    computed: usize,
    seconds: f64,
    folder: PathBuf,
}

impl Report {
    pub(super) fn json(&self) -> Value {
        let Self { cached, computed, seconds, folder } = self;
        json!({ "cached": cached, "computed": computed, "seconds": seconds, "cache": folder })
    }
}

/// How the pass ended.
pub(super) enum Outcome {
    /// Every log-prob that the run needs is known.
    Done(Report),
    /// There is nothing to compute beforehand: the loss needs none, or the recipe has no cache.
    InTheUpdate,
    /// Somebody asked to stop; what was computed is kept.
    Interrupted(u8),
}

/// Makes all reference log-probs known that the rest of the run needs.
///
/// # Errors
/// A log-prob that is not finite. A cache that cannot be written is only said.
pub(super) fn fill(
    prepared: &Prepared,
    trainer: &mut Trainer<'_>,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<Outcome, Failure> {
    let Prepared { run, fingerprints, train, .. } = prepared;
    let in_run = run.folder.path().join("reference");
    let root = match run.resolved.recipe.reference.cache {
        CachePlace::Off => return Ok(Outcome::InTheUpdate),
        CachePlace::Run => in_run,
        CachePlace::User => user_cache("reference").unwrap_or(in_run),
    };
    let needed = trainer.needed_references();
    let unknown = |trainer: &Trainer<'_>| -> Vec<usize> {
        needed.iter().copied().filter(|&example| !trainer.knows_reference(example)).collect()
    };
    let asked = unknown(trainer);
    if asked.is_empty() {
        return Ok(Outcome::InTheUpdate);
    }
    let started = Instant::now();
    let budget = run.resolved.plan.scoring_tokens;
    let (config, shared) = (trainer.model().decoder().config(), trainer.plan().share_prompts);
    // another adapter below it is another reference
    let init = fingerprints.init.as_ref().filter(|_| trainer.model().has_reference_adapter());
    let reference = init.map_or_else(|| fingerprints.base.clone(), |init| format!("{}+{init}", fingerprints.base));
    // another element type gives other numbers
    let dtype = trainer.model().decoder().dtype();
    let reference = if dtype == DType::F32 { reference } else { format!("{reference}-{}", dtype.as_str()) };
    let cache = ReferenceCache::new(&root, &reference, config, train, shared);
    let cached = believed(&cache, &asked, trainer, budget, console, train)?;
    trainer.reference_mut().take(&cached);

    let missing = unknown(trainer);
    let bar = console.count_bar("reference", missing.len() as u64);
    let mut keeper = Keeper { cache: &cache, console, data: train, kept: 0, last: Instant::now(), failed: false };
    let (mut done, mut tokens) = (0, 0);
    while done < missing.len() {
        if let Some(code) = interrupt.asked() {
            keeper.keep(trainer, &missing[..done]);
            return Ok(Outcome::Interrupted(code));
        }
        let chunk = chunk(&missing[done..], budget, train);
        tokens += trainer.compute_references(chunk, budget).map_err(failed)?;
        done += chunk.len();
        Bar::advance(&bar, chunk.len() as u64);
        if keeper.last.elapsed() >= KEEP_EVERY {
            keeper.keep(trainer, &missing[..done]);
        }
    }
    drop(bar);
    keeper.keep(trainer, &missing);
    if !missing.is_empty()
        && let Err(error) = cache.merge(train)
    {
        console.warning(error);
    }
    let seconds = started.elapsed().as_secs_f64();
    let computed = match missing.len() {
        0 => String::new(),
        count => format!(
            "{} rows computed in {} ({} tok/s); ",
            thousands(count),
            duration(seconds),
            short((tokens as f64 / seconds) as usize)
        ),
    };
    let from = match asked.len() - missing.len() {
        0 => String::new(),
        count => format!("{} rows known from an earlier run, {} checked; ", thousands(count), CHECKED.min(count)),
    };
    let kept = if keeper.failed { "not kept".to_owned() } else { format!("kept in {}", cache.folder().display()) };
    console.fact("reference", format_args!("{from}{computed}{kept}"));
    let (computed, folder) = (missing.len(), cache.folder().to_owned());
    Ok(Outcome::Done(Report { cached: asked.len() - computed, computed, seconds, folder }))
}

/// What a cache knows of `asked`, if a few of its numbers are what the model gives now. A cache that is broken or wrong
/// is said to be so and removed.
fn believed(
    cache: &ReferenceCache,
    asked: &[usize],
    trainer: &mut Trainer<'_>,
    budget: usize,
    console: &Console,
    data: &Dataset,
) -> Result<Vec<Entry>, Failure> {
    let problem = match cache.read(data) {
        Ok((mut entries, _)) => {
            let mut wanted = vec![false; data.len()];
            asked.iter().for_each(|&example| wanted[example] = true);
            entries.retain(|entry| wanted[entry.example]);
            entries.sort_by_key(|entry| entry.example);
            entries.dedup_by_key(|entry| entry.example);
            let spread =
                (0..CHECKED.min(entries.len())).map(|i| entries[i * entries.len() / CHECKED.min(entries.len())]);
            let sample: Vec<Entry> = spread.collect();
            let examples: Vec<usize> = sample.iter().map(|entry| entry.example).collect();
            trainer.compute_references(&examples, budget).map_err(failed)?;
            let differ = |(cached, now): (&Entry, &Entry)| {
                let both = cached.logps.iter().zip(&now.logps);
                both.into_iter().any(|(a, b)| !a.zip(*b).is_none_or(|(a, b)| reference::agree(a, b)))
            };
            let now = trainer.reference().entries(&examples);
            // if they are wrong, the pass computes and keeps them; if they are right, the kept ones are taken
            trainer.reference_mut().forget(&examples);
            match sample.iter().zip(&now).find(|two| differ(*two)) {
                None => return Ok(entries),
                Some((cached, now)) => format!(
                    "{}: {} has the log-probs {:?}, and the base gives {:?}",
                    cache.folder().display(),
                    data.origin(cached.example),
                    cached.logps,
                    now.logps
                ),
            }
        }
        Err(broken) => broken.to_string(),
    };
    console.warning(format_args!("the kept reference is not used and computed anew: {problem}"));
    if let Err(error) = cache.discard() {
        console.warning(error);
    }
    Ok(Vec::new())
}

/// The first examples that fill `budget` rows.
fn chunk<'e>(examples: &'e [usize], budget: usize, data: &Dataset) -> &'e [usize] {
    let rows = |&example: &usize| {
        let example = data.get(example);
        let sides = [example.chosen, example.rejected].into_iter().flatten();
        example.prompt.len() + sides.map(<[u32]>::len).sum::<usize>()
    };
    let filled = examples.iter().scan(0, |filled, example| {
        *filled += rows(example);
        Some(*filled)
    });
    &examples[..filled.take_while(|&filled| filled <= budget).count().max(1)]
}

/// Writes what was computed since it last did.
struct Keeper<'k> {
    cache: &'k ReferenceCache,
    console: &'k Console,
    data: &'k Dataset,
    kept: usize,
    last: Instant,
    failed: bool,
}

impl Keeper<'_> {
    fn keep(&mut self, trainer: &Trainer<'_>, done: &[usize]) {
        let new = &done[self.kept..];
        if self.failed || new.is_empty() {
            return;
        }
        if let Err(error) = self.cache.append(&trainer.reference().entries(new), self.data) {
            self.console.warning(format_args!("{error}; the run goes on, the next one computes the reference again"));
            self.failed = true;
        }
        (self.kept, self.last) = (done.len(), Instant::now());
    }
}
