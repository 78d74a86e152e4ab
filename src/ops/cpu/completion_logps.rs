//! The head's scores and gradient, a chunk of rows at a time.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, Onto, Threads, gemm};
use super::{Real, for_real, max_of, sum_of, tensor, values, vectorised};
use crate::ops::completion_logps::{TokenScore, Want, chunk_rows};
use crate::ops::dims2;

pub(crate) fn score(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    want: Want,
) -> Result<(Vec<TokenScore>, Option<Tensor>)> {
    let (rows, d) = dims2(hidden)?;
    let (vocabulary, width) = dims2(weight)?;
    if d != width {
        candle_core::bail!("head: rows of {d} and a head of {width} columns")
    }
    for_real!(hidden, T => {
        let (hidden, weight) = (values::<T>(hidden)?, values::<T>(weight)?);
        let (scores, u) = scored(&hidden, &weight, vocabulary, d, targets, want);
        Ok((scores, u.map(|u| tensor(u, (rows, d))).transpose()?))
    })
}

fn scored<T: Real>(
    hidden: &[T],
    weight: &[T],
    vocabulary: usize,
    d: usize,
    targets: &[u32],
    want: Want,
) -> (Vec<TokenScore>, Option<Vec<T>>) {
    let chunk = chunk_rows(vocabulary, size_of::<T>());
    let weight = Matrix::new(weight, vocabulary, d);
    let mut logits = vec![T::of(0.0); chunk.min(targets.len()) * vocabulary];
    let mut scores = Vec::with_capacity(targets.len());
    let mut u = (want == Want::Gradient).then(|| vec![T::of(0.0); hidden.len()]);
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let rows = i * chunk * d..(i * chunk + targets.len()) * d;
        let logits = &mut logits[..targets.len() * vocabulary];
        let hidden = Matrix::new(&hidden[rows.clone()], targets.len(), d);
        gemm(logits, vocabulary, Onto::Nothing, 1.0, hidden, weight.t(), Threads::All);
        let chunk_scores: Vec<TokenScore> = logits
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .map_init(Vec::new, |exps, (logits, &target)| {
                vectorised(
                    #[inline(always)]
                    || score_row(logits, target as usize, want, exps),
                )
            })
            .collect();
        scores.extend(chunk_scores);
        if let Some(u) = &mut u {
            let slopes = Matrix::new(logits, targets.len(), vocabulary);
            gemm(&mut u[rows], d, Onto::Nothing, 1.0, slopes, weight, Threads::All);
        }
    }
    (scores, u)
}

/// Scores one row of logits; for a gradient it leaves `onehot(target) − softmax` in their place. `exps` is scratch.
#[inline(always)]
fn score_row<T: Real>(logits: &mut [T], target: usize, want: Want, exps: &mut Vec<T>) -> TokenScore {
    let count = logits.len();
    let largest = max_of(logits);
    exps.resize(count, T::of(0.0));
    for (exp, &logit) in exps.iter_mut().zip(logits.iter()) {
        *exp = (logit - largest).exp_in_loop();
    }
    let sum = sum_of(count, |i| exps[i]);
    // entropy = ln Σ e − Σ z e / Σ e, with z the logit less the largest
    let along = sum_of(count, |i| (logits[i] - largest) * exps[i]);
    let score = TokenScore {
        logp: (logits[target] - largest - sum.ln()).to_f64(),
        entropy: (sum.ln() - along / sum).to_f64(),
        mean_logit: sum_of(count, |i| logits[i]).to_f64() / count as f64,
        top1: logits[target] >= largest,
    };
    if want == Want::Gradient {
        let scale = -sum.recip();
        for (slope, &exp) in logits.iter_mut().zip(exps.iter()) {
            *slope = exp * scale;
        }
        logits[target] += T::of(1.0);
    }
    score
}
