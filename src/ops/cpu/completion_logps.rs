//! The head's scores and gradient, a panel of the vocabulary at a time.

use std::ops::Range;

use candle_core::{Result, Tensor};
use num_traits::Float;
use rayon::prelude::*;

use super::gemm::{Matrix, Onto, Threads, gemm};
use super::weight::{Rows, Scratch, panels};
use super::{Real, filled, for_real, max_of, sum_of, tensor, values, vectorised};
use crate::ops::completion_logps::{Head, TokenScore, Want};
use crate::ops::dims2;

/// Rows whose logits are held at once.
const BLOCK: usize = 1024;
/// Tokens whose logits are held at once. With [`BLOCK`] that is 8 MiB of f32, which a processor's last cache holds,
/// and products large enough to run at full speed.
const PANEL: usize = 2048;

/// Bytes of logits held for elements of `bytes`, whatever the rows and the vocabulary.
pub(crate) fn scratch_bytes(bytes: usize) -> usize {
    BLOCK * PANEL * bytes
}

pub(crate) fn score(
    hidden: &Tensor,
    head: Head<'_>,
    targets: &[u32],
    want: Want,
) -> Result<(Vec<TokenScore>, Option<Tensor>)> {
    let (rows, d) = dims2(hidden)?;
    for_real!(hidden, T => {
        let (scores, u) = score_all::<T>(&values(hidden)?, head, targets, want)?;
        Ok((scores, u.map(|u| tensor(u, (rows, d))).transpose()?))
    })
}

/// What is known of a row's distribution after some panels; sums are relative to the largest logit so far.
#[derive(Clone, Copy)]
struct Seen<T> {
    largest: T,
    /// `Σ e^(z − largest)`
    sum: T,
    /// `Σ (z − largest) e^(z − largest)`
    along: T,
    /// `Σ z`
    total: f64,
    /// The target's logit.
    target: T,
    /// The token of the largest logit.
    best: u32,
}

type Scored<T> = (Vec<TokenScore>, Option<Vec<T>>);

fn score_all<T: Real>(hidden: &[T], head: Head<'_>, targets: &[u32], want: Want) -> Result<Scored<T>> {
    let (vocabulary, d) = head.weight.dims()?;
    let cap = head.softcap.map(T::of);
    let unseen = Seen {
        largest: T::neg_infinity(),
        sum: T::of(0.0),
        along: T::of(0.0),
        total: 0.0,
        target: T::of(0.0),
        best: 0,
    };
    let mut seen = vec![unseen; targets.len()];
    let [mut u] = filled(if want == Want::Gradient { hidden.len() } else { 0 }, d, |_, _| {});
    let mut logits = vec![T::of(0.0); BLOCK.min(targets.len()) * PANEL.min(vocabulary)];
    panels(head.weight, Some(PANEL), |tokens, weight| {
        let panel = Panel { tokens, weight, cap };
        for first in (0..targets.len()).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(targets.len());
            let u = u.get_mut(rows.start * d..rows.end * d).unwrap_or_default();
            let hidden = Matrix::new(&hidden[rows.start * d..rows.end * d], rows.len(), d);
            panel.add(hidden, &targets[rows.clone()], &mut seen[rows], &mut logits, u);
        }
    })?;
    // so far U is −Σ e^(z − largest) W
    let weight = Rows::of(head.weight)?;
    u.par_chunks_mut(d).zip(&seen).zip(targets).for_each_init(Scratch::new, |scratch, ((u, seen), &target)| {
        let share = seen.sum.recip();
        let slope = slope(seen.target, cap);
        for (u, &w) in u.iter_mut().zip(weight.row(target as usize, scratch)) {
            *u = *u * share + slope * w;
        }
    });
    let scores = seen.iter().map(|seen| seen.score(vocabulary)).collect();
    Ok((scores, (want == Want::Gradient).then_some(u)))
}

/// What a capped logit's derivative is multiplied by.
#[inline(always)]
fn slope<T: Real>(logit: T, cap: Option<T>) -> T {
    cap.map_or(T::of(1.0), |cap| T::of(1.0) - (logit / cap) * (logit / cap))
}

/// Some tokens of the vocabulary.
struct Panel<'a, T> {
    tokens: Range<usize>,
    /// Their rows of the head.
    weight: Matrix<'a, T>,
    cap: Option<T>,
}

impl<T: Real> Panel<'_, T> {
    /// Adds the panel to what is known of some rows; `u` is empty where no gradient is wanted.
    fn add(&self, hidden: Matrix<'_, T>, targets: &[u32], seen: &mut [Seen<T>], logits: &mut [T], u: &mut [T]) {
        let Self { tokens, weight, cap } = self;
        let (width, d) = (tokens.len(), weight.columns());
        let logits = &mut logits[..targets.len() * width];
        gemm(logits, width, Onto::Nothing, 1.0, hidden, weight.t(), Threads::All);
        let gradient = !u.is_empty();
        let rescale = |(i, (logits, seen)): (usize, (&mut [T], &mut Seen<T>))| {
            let target = (targets[i] as usize).checked_sub(tokens.start).filter(|&at| at < width);
            let shrunk = vectorised(
                #[inline(always)]
                || seen.add(logits, target, *cap, tokens.start),
            );
            (i, shrunk)
        };
        let rows = logits.par_chunks_mut(width).zip(seen).enumerate();
        if gradient {
            rows.map(rescale).zip(u.par_chunks_mut(d)).for_each(|((_, shrunk), u)| {
                if shrunk != T::of(1.0) {
                    u.iter_mut().for_each(|u| *u *= shrunk);
                }
            });
            gemm(u, d, Onto::Existing, -1.0, Matrix::new(logits, targets.len(), width), *weight, Threads::All);
        } else {
            rows.map(rescale).for_each(|_| {});
        }
    }
}

impl<T: Real> Seen<T> {
    /// Takes in some logits and leaves `e^(z − largest)` in their place, times the slope where they are capped; returns
    /// what sums taken before have to be multiplied by, now that the largest may be another.
    #[inline(always)]
    fn add(&mut self, logits: &mut [T], target: Option<usize>, cap: Option<T>, first: usize) -> T {
        if let Some(cap) = cap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh_in_loop());
        }
        if let Some(target) = target {
            self.target = logits[target];
        }
        let before = self.largest;
        let largest = Float::max(max_of(logits), before);
        if largest > before {
            self.best = (first + logits.iter().position(|&logit| logit == largest).unwrap_or(0)) as u32;
        }
        let shrunk = if before == T::neg_infinity() { T::of(0.0) } else { (before - largest).exp() };
        if shrunk != T::of(1.0) {
            let moved = if before == T::neg_infinity() { T::of(0.0) } else { before - largest };
            self.along = shrunk * (self.along + moved * self.sum);
            self.sum *= shrunk;
            self.largest = largest;
        }
        let count = logits.len();
        self.total += sum_of(count, |i| logits[i]).to_f64();
        // entropy needs Σ z e^z: the shifted logits are kept in the sum's own registers
        const STRIP: usize = 256;
        for strip in logits.chunks_mut(STRIP) {
            let mut shifted = [T::of(0.0); STRIP];
            for (shifted, logit) in shifted.iter_mut().zip(strip.iter_mut()) {
                *shifted = *logit - largest;
                *logit = shifted.exp_in_loop();
            }
            self.sum += sum_of(strip.len(), |i| strip[i]);
            self.along += sum_of(strip.len(), |i| shifted[i] * strip[i]);
            if cap.is_some() {
                for (logit, &shifted) in strip.iter_mut().zip(&shifted) {
                    *logit *= slope(shifted + largest, cap);
                }
            }
        }
        shrunk
    }

    fn score(&self, vocabulary: usize) -> TokenScore {
        TokenScore {
            logp: (self.target - self.largest - self.sum.ln()).to_f64(),
            // ln Σ e − Σ z e / Σ e, with z the logit less the largest
            entropy: (self.sum.ln() - self.along / self.sum).to_f64(),
            mean_logit: self.total / vocabulary as f64,
            top1: self.target >= self.largest,
            best: self.best,
            // the same steps as the target's, which is the largest less itself then
            best_logp: (T::of(0.0) - self.sum.ln()).to_f64(),
        }
    }
}
