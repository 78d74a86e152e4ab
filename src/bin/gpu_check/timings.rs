//! Where the time of an update goes: each op by itself, at the sizes of one layer of Llama 3.1 8B and a micro-batch of
//! UltraFeedback's rows. Nothing is compared; the table tells what to make faster next.

use std::time::Instant;

use candle_core::{DType, Result, Tensor};
use dpo_lora::ops::attention::{self, Heads, Segment, Segments};
use dpo_lora::ops::completion_logps::{self, Head, Want};
use dpo_lora::ops::cuda::peak_memory;
use dpo_lora::ops::cuda::weight::{Recent, Resident};
use dpo_lora::ops::glu::{self, Activation};
use dpo_lora::ops::linear::{self, Branch, LowRank};
use dpo_lora::ops::norm;
use dpo_lora::ops::rope::{self, Angles, Turn};
use dpo_lora::quant::Weight;

use super::Check;

const RANK: usize = 16;

/// What limits an op.
enum Work {
    /// Operations.
    Products(f64),
    /// Bytes read and written.
    Memory(f64),
}

/// A line of the table.
struct Line {
    what: &'static str,
    seconds: f64,
    work: Work,
    /// How often in a micro-batch; 0 for what is not part of an update.
    times: usize,
}

struct Sizes {
    hidden: usize,
    inner: usize,
    heads: Heads,
    layers: usize,
    vocabulary: usize,
    /// Prompt and completions of each pair.
    pairs: Vec<[usize; 3]>,
}

pub(crate) fn all(check: &mut Check) -> std::result::Result<(), String> {
    let sizes = if check.small {
        let heads = Heads { queries: 4, keys: 2, dimension: 16, scale: 0.25, softcap: None, window: None };
        Sizes { hidden: 64, inner: 128, heads, layers: 2, vocabulary: 300, pairs: vec![[4, 3, 5]; 2] }
    } else {
        let heads =
            Heads { queries: 32, keys: 8, dimension: 128, scale: 128f64.powf(-0.5), softcap: None, window: None };
        Sizes { hidden: 4096, inner: 14_336, heads, layers: 32, vocabulary: 128_256, pairs: vec![[200, 250, 230]; 6] }
    };
    let lines = measure(check, &sizes).map_err(|e| e.to_string())?;
    let all: f64 = lines.iter().map(|line| line.seconds * line.times as f64).sum();
    eprintln!("  {:<44}{:>10}{:>16}{:>7}{:>9}", "op", "ms", "", "times", "share");
    for Line { what, seconds, work, times } in &lines {
        let rate = match work {
            Work::Products(operations) => format!("{:.0} TFLOP/s", operations / seconds / 1e12),
            Work::Memory(bytes) => format!("{:.0} GB/s", bytes / seconds / 1e9),
        };
        let share = 100.0 * seconds * *times as f64 / all;
        eprintln!("  {what:<44}{:>10.3}{rate:>16}{times:>7}{share:>8.1}%", 1e3 * seconds);
    }
    eprintln!("  {:<44}{:>10.3}", "a micro-batch, all of it one after the other", 1e3 * all);
    Ok(())
}

/// The mean time of `f`, once it has been called twice: cuBLAS has chosen its kernels then, and memory is in the pool.
fn seconds(check: &Check, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let repeats = if check.small { 1 } else { 10 };
    // asking for memory waits for the device
    let wait = || peak_memory(&check.device, false);
    f()?;
    f()?;
    wait()?;
    let started = Instant::now();
    (0..repeats).try_for_each(|_| f())?;
    wait()?;
    Ok(started.elapsed().as_secs_f64() / repeats as f64)
}

fn measure(check: &mut Check, sizes: &Sizes) -> Result<Vec<Line>> {
    let &Sizes { hidden, inner, heads, layers, vocabulary, ref pairs } = sizes;
    let device = check.device.clone();
    let normal =
        |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &device)?.to_dtype(DType::BF16);
    let (of_q, of_k) = (heads.queries * heads.dimension, heads.keys * heads.dimension);
    let shapes = [
        (of_q, hidden),
        (of_k, hidden),
        (of_k, hidden),
        (hidden, of_q),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ];
    let elements: usize = shapes.iter().map(|(outputs, inputs)| outputs * inputs).sum();
    let rows: usize = pairs.iter().map(|[prompt, chosen, rejected]| prompt + chosen + rejected - 2).sum();
    let scored: usize = pairs.iter().map(|[_, chosen, rejected]| chosen + rejected).sum();
    let (products, head) = (2.0 * rows as f64 * elements as f64, 2.0 * (scored * hidden * vocabulary) as f64);
    let mut lines = Vec::new();
    let mut note = |what, seconds, work, times| lines.push(Line { what, seconds, work, times });

    let nothing_kept = Recent::new(0);
    let blocks = shapes.map(|(outputs, inputs)| Resident::random_nf4(outputs, inputs, 0.02, &device, &nothing_kept));
    let blocks = blocks.into_iter().collect::<Result<Vec<_>>>()?;
    let held: usize = blocks.iter().map(Resident::num_bytes).sum();
    let dequantizing = seconds(check, || blocks.iter().try_for_each(|matrix| matrix.dense(DType::BF16).map(drop)))?;
    note(
        "NF4 to bf16, a layer (forward, backward)",
        dequantizing,
        Work::Memory((held + 2 * elements) as f64),
        2 * layers,
    );

    let weights =
        blocks.iter().map(|matrix| matrix.dense(DType::BF16).map(Weight::Dense)).collect::<Result<Vec<_>>>()?;
    let (wide, narrow) = (normal(rows, inner)?, normal(rows, hidden)?);
    let queries = normal(rows, of_q)?;
    let input = |inputs: usize| {
        if inputs == inner {
            &wide
        } else if inputs == of_q {
            &queries
        } else {
            &narrow
        }
    };
    let adapters = shapes.map(|(outputs, inputs)| {
        let random = |rows: usize, columns: usize| Tensor::randn(0f32, 0.02, (rows, columns), &device);
        Ok::<_, candle_core::Error>((random(RANK, inputs)?, random(outputs, RANK)?))
    });
    let adapters = adapters.into_iter().collect::<Result<Vec<_>>>()?;
    let gradients = shapes.map(|(outputs, _)| normal(rows, outputs)).into_iter().collect::<Result<Vec<_>>>()?;
    let mut passes = Vec::new();
    for with in [false, true] {
        let branch = |i: usize| {
            let (a, b): &(Tensor, Tensor) = &adapters[i];
            let update = with.then_some(LowRank { a, b, scale: 2.0, dropout: None, magnitude: None });
            [Branch { weight: &weights[i], bias: None, update }]
        };
        let forward = seconds(check, || {
            (0..shapes.len()).try_for_each(|i| linear::forward(input(shapes[i].1), &branch(i), None).map(drop))
        })?;
        // `x Aᵀ` is kept from the forward pass
        let kept = (0..shapes.len()).map(|i| Ok(linear::forward(input(shapes[i].1), &branch(i), None)?.1));
        let kept = kept.collect::<Result<Vec<_>>>()?;
        let backward = seconds(check, || {
            (0..shapes.len()).try_for_each(|i| {
                linear::backward([&gradients[i]], &branch(i), input(shapes[i].1), kept[i].as_ref(), true).map(drop)
            })
        })?;
        passes.push([forward, backward]);
    }
    note("products by frozen matrices, forward", passes[0][0], Work::Products(products), layers);
    note("the same, backward", passes[0][1], Work::Products(products), layers);
    let of_adapters = 2.0 * (rows * RANK) as f64 * shapes.iter().map(|(o, i)| o + i).sum::<usize>() as f64;
    note("adapters, forward", passes[1][0] - passes[0][0], Work::Products(of_adapters), layers);
    note("adapters, backward", passes[1][1] - passes[0][1], Work::Products(2.0 * of_adapters), layers);

    let weight = Tensor::ones(hidden, DType::F32, &device)?;
    let (_, rho) = norm::forward(&narrow, &weight, 1e-5)?;
    let of_rows = 2.0 * (rows * hidden) as f64;
    let time = seconds(check, || norm::forward(&narrow, &weight, 1e-5).map(drop))?;
    note("norm, forward", time, Work::Memory(2.0 * of_rows), 2 * layers);
    let time = seconds(check, || norm::backward(&narrow, &narrow, &weight, &rho, Some(&narrow)).map(drop))?;
    note("norm, backward", time, Work::Memory(4.0 * of_rows), 2 * layers);

    let (q, k, v) = (queries.clone(), normal(rows, of_k)?, normal(rows, of_k)?);
    let frequencies: Vec<f32> =
        (0..heads.dimension / 2).map(|i| 5e5f32.powf(-2.0 * i as f32 / heads.dimension as f32)).collect();
    let positions: Vec<u32> = (0..rows as u32).collect();
    let angles = Angles::new(|_| &frequencies, &positions, 1.0, DType::F32, &device)?;
    let time = seconds(check, || rope::turn_both([&q, &k], [&angles; 2], Turn::Forward).map(drop))?;
    note("rope of q and k", time, Work::Memory(4.0 * (rows * (of_q + of_k)) as f64), 2 * layers);

    let (segments, seen) = segments(pairs);
    let saved = attention::forward(&q, &k, &v, heads, &segments)?;
    let operations = 4.0 * seen as f64 * of_q as f64;
    let time = seconds(check, || attention::forward(&q, &k, &v, heads, &segments).map(drop))?;
    note("attention, forward", time, Work::Products(operations), layers);
    let time = seconds(check, || attention::backward(&q, &q, &k, &v, &saved, heads, &segments).map(drop))?;
    note("attention, backward", time, Work::Products(2.5 * operations), layers);

    let of_units = 2.0 * (rows * inner) as f64;
    let time = seconds(check, || glu::forward(&wide, &gradients[4], Activation::Silu).map(drop))?;
    note("SwiGLU, forward", time, Work::Memory(3.0 * of_units), layers);
    let time = seconds(check, || glu::backward(&wide, &wide, &gradients[4], Activation::Silu).map(drop))?;
    note("SwiGLU, backward", time, Work::Memory(6.0 * of_units), layers);

    let (states, of_head) = (normal(scored, hidden)?, Weight::Dense((normal(vocabulary, hidden)? * 0.02)?));
    let targets: Vec<u32> = (0..scored).map(|i| (i * 977 % vocabulary) as u32).collect();
    let scored_by = Head { weight: &of_head, softcap: None };
    let time = seconds(check, || completion_logps::score(&states, scored_by, &targets, Want::Gradient).map(drop))?;
    note("head, both ways", time, Work::Products(2.0 * head), 1);

    for (what, count) in [("generation: 1 row by a layer in NF4", 1), ("generation: 16 rows by a layer in NF4", 16)] {
        let few = |inputs: usize| input(inputs).narrow(0, 0, count.min(rows))?.contiguous();
        let inputs = shapes.map(|(_, inputs)| few(inputs)).into_iter().collect::<Result<Vec<_>>>()?;
        let matrices: Vec<Weight> = blocks.iter().cloned().map(Weight::OnDevice).collect();
        let time = seconds(check, || {
            matrices.iter().zip(&inputs).try_for_each(|(matrix, x)| linear::apply(x, matrix).map(drop))
        })?;
        note(what, time, Work::Memory(held as f64), 0);
    }
    Ok(lines)
}

/// Prompts with two branches each, and how many query and key pairs are looked at.
fn segments(pairs: &[[usize; 3]]) -> (Segments, usize) {
    let causal = |n: usize| n * (n + 1) / 2;
    let (mut groups, mut start, mut seen) = (Vec::new(), 0, 0);
    for &[prompt, chosen, rejected] in pairs {
        let prefix = start..start + prompt;
        let mut group = vec![Segment { queries: prefix.clone(), prefix: 0..0, own: prefix.clone() }];
        seen += causal(prompt);
        start += prompt;
        // the last token of a completion is scored, and asks nothing
        for rows in [chosen - 1, rejected - 1] {
            let own = start..start + rows;
            group.push(Segment { queries: own.clone(), prefix: prefix.clone(), own });
            seen += causal(rows) + rows * prompt;
            start += rows;
        }
        groups.push(group);
    }
    (Segments::new(groups), seen)
}
