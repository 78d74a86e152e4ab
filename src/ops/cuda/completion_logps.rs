//! The head: logits of some rows in f32, then one pass of our own over them, then the product that makes the gradient.

use candle_core::{DType, Result, Tensor};

use super::driver::{Launch, Onto, Operand, empty, gemm, modules};
use super::weight::matrix;
use crate::ops::completion_logps::{GPU_CHUNK as CHUNK, Head, TokenScore, Want};
use crate::ops::dims2;

/// Threads of a row of logits.
const THREADS: u32 = 512;

pub(crate) fn score(
    hidden: &Tensor,
    head: Head<'_>,
    targets: &[u32],
    want: Want,
) -> Result<(Vec<TokenScore>, Option<Tensor>)> {
    let (rows, d) = dims2(hidden)?;
    let (vocabulary, _) = head.weight.dims()?;
    let (dtype, device) = (hidden.dtype(), hidden.device());
    let weight = matrix(head.weight, dtype, device)?;
    let u = match want {
        Want::Gradient => Some(empty((rows, d), dtype, device)?),
        Want::Scores => None,
    };
    let scores = empty((rows, 6), DType::F32, device)?;
    let most = CHUNK.min(rows);
    let logits = empty((most, vocabulary), DType::F32, device)?;
    let gradient = u.as_ref().map(|_| empty((most, vocabulary), dtype, device)).transpose()?;
    for start in (0..rows).step_by(CHUNK) {
        let count = CHUNK.min(rows - start);
        let whole = Operand::of(hidden)?;
        let hidden = Operand { start: start * d, ..whole };
        let weight = Operand::of(&weight)?;
        gemm([count, vocabulary, d], hidden, weight.t(), Operand::of(&logits)?, 1, 1.0, Onto::Nothing)?;
        let targets = Tensor::new(&targets[start..start + count], device)?;
        let of_chunk = scores.narrow(0, start, count)?;
        Launch::of(modules::completion_logps, "score_tokens", hidden.tensor)?
            .tensor(&logits)?
            .tensor(&targets)?
            .tensor(&of_chunk)?
            .optional(gradient.as_ref())?
            .count(vocabulary)?
            .float(head.softcap.unwrap_or(0.0))
            .run([count, 1], [THREADS, 1])?;
        if let (Some(u), Some(gradient)) = (&u, &gradient) {
            let onto = Operand { start: start * d, ..Operand::of(u)? };
            gemm([count, d, vocabulary], Operand::of(gradient)?, weight, onto, 1, 1.0, Onto::Nothing)?;
        }
    }
    let score = |row: Vec<f32>| TokenScore {
        logp: row[0].into(),
        entropy: row[1].into(),
        mean_logit: row[2].into(),
        top1: row[3] > 0.0,
        best_logp: row[4].into(),
        best: row[5] as u32,
    };
    Ok((scores.to_vec2::<f32>()?.into_iter().map(score).collect(), u))
}

/// `g ⊙ U`
pub(crate) fn backward(u: &Tensor, g: &[f64]) -> Result<Tensor> {
    let (rows, d) = dims2(u)?;
    let factors: Vec<f32> = g.iter().map(|&g| g as f32).collect();
    let factors = Tensor::from_vec(factors, rows, u.device())?;
    let out = empty((rows, d), u.dtype(), u.device())?;
    Launch::of(modules::completion_logps, "scale_rows", u)?
        .tensor(u)?
        .tensor(&factors)?
        .tensor(&out)?
        .count(rows)?
        .count(d)?
        .run([rows, 1], [256, 1])?;
    Ok(out)
}
