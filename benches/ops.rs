//! Each operator, forward and backward, in the shape of a layer of SmolLM2-135M with two pairs of UltraFeedback's mean
//! lengths in a batch. `cargo bench --bench ops`, `cargo bench --bench ops -- attention`.
//!
//! Throughput is in multiply-adds times two where an operator is made of products (`Gelem/s` reads as GFLOP/s, to be
//! held against `product`), and in elements otherwise.

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor};
use criterion::{Criterion, Throughput};
use dpo_lora::model::{Packer, PromptSpan};
use dpo_lora::ops::attention::{self, Heads};
use dpo_lora::ops::completion_logps::{self, Head, Want};
use dpo_lora::ops::glu::{self, Activation};
use dpo_lora::ops::linear::{self, Branch, LowRank};
use dpo_lora::ops::rope::{self, Angles, Turn};
use dpo_lora::ops::{norm, rows};
use dpo_lora::quant::{Quant, Weight};

const D: usize = 576;
const F: usize = 1536;
const VOCABULARY: usize = 49_152;
const RANK: usize = 16;
const HEADS: Heads = Heads { queries: 9, keys: 3, dimension: 64, scale: 0.125, softcap: None, window: None };
/// Prompt and completion, tokens.
const LENGTHS: (usize, usize) = (121, 288);

fn random(rows: usize, columns: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).expect("made")
}

fn bench(c: &mut Criterion, name: &str, work: usize, mut f: impl FnMut() -> Result<()>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).throughput(Throughput::Elements(work as u64));
    group.bench_function("f32", |b| b.iter(|| f().expect("computed")));
    group.finish();
}

fn ops(c: &mut Criterion) {
    let mut packer = Packer::default();
    let (prompt, completion) = (vec![1; LENGTHS.0], vec![2; LENGTHS.1]);
    for key in 0..2 {
        packer.push(key, &prompt, &[&completion, &completion], PromptSpan::No);
    }
    let batch = packer.finish();
    let (t, scored) = (batch.ids.len(), batch.targets.len());

    let (x, dy) = (random(t, D), random(t, D));
    let weight = Tensor::ones(D, DType::F32, &Device::Cpu).expect("made");
    let (_, rho) = norm::forward(&x, &weight, 1e-5).expect("computed");
    bench(c, "norm forward", t * D, || norm::forward(&x, &weight, 1e-5).map(|y| _ = black_box(y)));
    bench(c, "norm backward", t * D, || {
        norm::backward(&dy, &x, &weight, &rho, Some(&dy)).map(|dx| _ = black_box(dx))
    });

    let frequencies: Vec<f32> = (0..32).map(|i| 10_000f32.powf(-(i as f32) / 32.0)).collect();
    let angles = Angles::new(|_| &frequencies, &batch.positions, 1.0, DType::F32, &Device::Cpu).expect("made");
    bench(c, "rope", t * D, || rope::turn(&x, &angles, Turn::Forward).map(|y| _ = black_box(y)));
    bench(c, "gather rows", scored * D, || rows::gather(&x, &batch.scored_rows).map(|y| _ = black_box(y)));

    let (gate, up, dh) = (random(t, F), random(t, F), random(t, F));
    bench(c, "swiglu forward", t * F, || glu::forward(&gate, &up, Activation::Silu).map(|h| _ = black_box(h)));
    bench(c, "swiglu backward", t * F, || glu::backward(&dh, &gate, &up, Activation::Silu).map(|d| _ = black_box(d)));

    let dense = random(F, D);
    let w = [random(F, D), random(F, D)].map(Weight::Dense);
    let (a, b) = ([random(RANK, D), random(RANK, D)], [random(F, RANK), random(F, RANK)]);
    let branches: [Branch<'_>; 2] = std::array::from_fn(|i| Branch {
        weight: &w[i],
        bias: None,
        update: Some(LowRank { a: &a[i], b: &b[i], scale: 2.0, dropout: None, magnitude: None }),
    });
    let frozen = branches.map(|branch| Branch { update: None, ..branch });
    let (base, update) = (2 * t * 2 * D * F, 2 * t * 2 * RANK * (D + F));
    bench(c, "product", 2 * t * D * F, || x.matmul(&dense.t()?).map(|y| _ = black_box(y)));
    bench(c, "linear forward, gate and up, frozen", base, || {
        linear::forward(&x, &frozen, None).map(|y| _ = black_box(y))
    });
    for quant in [Quant::Q8_0, Quant::Nf4] {
        let values = || dense.flatten_all().and_then(|w| w.to_vec1()).expect("f32");
        let quantized = [(); 2].map(|()| quant.of_linear(D).keep(F, D, values()).expect("kept"));
        let branches: [Branch<'_>; 2] = std::array::from_fn(|i| Branch { weight: &quantized[i], ..frozen[i] });
        bench(c, &format!("linear forward, gate and up, frozen, {}", quant.name()), base, || {
            linear::forward(&x, &branches, None).map(|y| _ = black_box(y))
        });
    }
    bench(c, "linear forward, gate and up, with adapters", base + update, || {
        linear::forward(&x, &branches, None).map(|y| _ = black_box(y))
    });
    let (_, inner) = linear::forward(&x, &branches, None).expect("computed");
    bench(c, "linear backward, gate and up, with adapters", base + 2 * update, || {
        linear::backward([&gate, &up], &branches, &x, inner.as_ref(), true).map(|d| _ = black_box(d))
    });

    let (q, k, v) = (random(t, D), random(t, 192), random(t, 192));
    let pairs = batch.segments.pairs() as usize * D;
    let saved = attention::forward(&q, &k, &v, HEADS, &batch.segments).expect("computed");
    bench(c, "attention forward", 4 * pairs, || {
        attention::forward(&q, &k, &v, HEADS, &batch.segments).map(|y| _ = black_box(y))
    });
    bench(c, "attention backward", 10 * pairs, || {
        attention::backward(&dy, &q, &k, &v, &saved, HEADS, &batch.segments).map(|d| _ = black_box(d))
    });

    let (hidden, weight) = (random(scored, D), Weight::Dense(random(VOCABULARY, D)));
    let head = Head { weight: &weight, softcap: None };
    for (name, want, passes) in [("head, scores", Want::Scores, 1), ("head, scores and gradient", Want::Gradient, 2)]
    {
        bench(c, name, passes * 2 * scored * D * VOCABULARY, || {
            completion_logps::score(&hidden, head, &batch.targets, want).map(|y| _ = black_box(y))
        });
    }
}

fn main() {
    dpo_lora::allocator::keep_freed_memory();
    // inside the pool, as the program runs: products are begun by one of the threads that compute them
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        ops(&mut criterion);
        criterion.final_summary();
    });
}
