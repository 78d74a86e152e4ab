//! Every kernel against the CPU's, which the tests hold to finite differences and to PyTorch.

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use dpo_lora::adapter::{self, LoraConfig};
use dpo_lora::model::family;
use dpo_lora::ops::attention::{self, Heads, Segment, Segments};
use dpo_lora::ops::completion_logps::{self, Head, TokenScore, Want};
use dpo_lora::ops::cuda::weight::{Recent, Resident};
use dpo_lora::ops::cuda::with_poison;
use dpo_lora::ops::dropout::Dropout;
use dpo_lora::ops::glu::{self, Activation};
use dpo_lora::ops::linear::{self, Branch, LowRank, LowRankGradient};
use dpo_lora::ops::rope::{self, Angles, Turn};
use dpo_lora::ops::{norm, rows};
use dpo_lora::quant::ggml::BlockType;
use dpo_lora::quant::{Kept, Quantized, Weight};
use dpo_lora::train::AdamW;
use dpo_lora::train::optimizer::{self, Rate};

use super::{Check, tolerance};

const TYPES: [DType; 2] = [DType::F32, DType::BF16];

pub(crate) fn all(check: &mut Check) -> Result<()> {
    for dtype in TYPES {
        with_poison(|| -> Result<()> {
            norms(check, dtype)?;
            ropes(check, dtype)?;
            glus(check, dtype)?;
            attentions(check, dtype)?;
            heads(check, dtype)?;
            blocks(check, dtype)?;
            linears(check, dtype)?;
            gathers(check, dtype)
        })?;
    }
    with_poison(|| optimizers(check))
}

fn name(what: &str, dtype: DType) -> String {
    format!("{what}, {}", dtype.as_str())
}

fn norms(check: &mut Check, dtype: DType) -> Result<()> {
    // heads, a width that is no multiple of a packet, one that a block takes, one that it goes through twice
    let shapes = if check.small {
        [(37, 64), (5, 37), (3, 1032), (2, 4096)]
    } else {
        [(4100, 128), (511, 1001), (2050, 4096), (513, 8192)]
    };
    for (count, width) in shapes {
        let (x, dy, onto) = (
            check.normal((count, width), dtype)?,
            check.normal((count, width), dtype)?,
            check.normal((count, width), dtype)?,
        );
        let weight = check.normal(width, DType::F32)?;
        let (y, rho) = norm::forward(&x, &weight, 1e-5)?;
        let dx = norm::backward(&dy, &x, &weight, &rho, None)?;
        let both = norm::backward(&dy, &x, &weight, &rho, Some(&onto))?;
        let [gx, gdy, gonto] = [&x, &dy, &onto].map(|tensor| check.there(tensor, dtype));
        let (gx, gdy, gonto, gweight) = (gx?, gdy?, gonto?, check.there(&weight, DType::F32)?);
        let (gy, grho) = norm::forward(&gx, &gweight, 1e-5)?;
        let what = |part: &str| name(&format!("norm {part} [{count}, {width}]"), dtype);
        check.compare(what("forward"), &gy, &y, tolerance(dtype))?;
        check.compare(what("scale"), &grho, &rho, tolerance(DType::F32))?;
        check.compare(what("again"), &norm::again(&gx, &gweight, &grho)?, &y, tolerance(dtype))?;
        check.compare(what("backward"), &norm::backward(&gdy, &gx, &gweight, &grho, None)?, &dx, tolerance(dtype))?;
        let gboth = norm::backward(&gdy, &gx, &gweight, &grho, Some(&gonto))?;
        check.compare(what("backward with residual"), &gboth, &both, tolerance(dtype))?;
    }
    Ok(())
}

fn ropes(check: &mut Check, dtype: DType) -> Result<()> {
    let rows = if check.small { 13 } else { 2049 };
    for (half, q_heads, k_heads) in [(64, 4, 1), (5, 3, 3)] {
        let frequencies: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
        let positions: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 1000).collect();
        let (q, k) =
            (check.normal((rows, q_heads * 2 * half), dtype)?, check.normal((rows, k_heads * 2 * half), dtype)?);
        let angles = |dtype, device: &Device| Angles::new(|_| &frequencies, &positions, 1.1, dtype, device);
        let (here, there) = (angles(DType::F64, &Device::Cpu)?, angles(DType::F32, &check.device)?);
        let (gq, gk) = (check.there(&q, dtype)?, check.there(&k, dtype)?);
        for (way, of) in [(Turn::Forward, "forward"), (Turn::Backward, "backward")] {
            let right = rope::turn_both([&q, &k], [&here, &here], way)?;
            let found = rope::turn_both([&gq, &gk], [&there, &there], way)?;
            for (which, (found, right)) in ["q", "k"].into_iter().zip(found.iter().zip(&right)) {
                check.compare(
                    name(&format!("rope {of} of {which}, heads of {}", 2 * half), dtype),
                    found,
                    right,
                    tolerance(dtype),
                )?;
            }
            let single = rope::turn(&gk, &there, way)?;
            check.compare(
                name(&format!("rope {of} alone, heads of {}", 2 * half), dtype),
                &single,
                &right[1],
                tolerance(dtype),
            )?;
        }
    }
    Ok(())
}

fn glus(check: &mut Check, dtype: DType) -> Result<()> {
    let shapes = if check.small { [(7, 264), (5, 33)] } else { [(1025, 14336), (511, 1003)] };
    for (shape, (activation, of)) in shapes
        .into_iter()
        .flat_map(|shape| [(shape, (Activation::Silu, "SwiGLU")), (shape, (Activation::GeluTanh, "GeGLU"))])
    {
        let [gate, up, dh] = [0; 3].map(|_| check.normal(shape, dtype));
        let (gate, up, dh) = (gate?, up?, dh?);
        let right = glu::backward(&dh, &gate, &up, activation)?;
        let [gate, up, dh] = [&gate, &up, &dh].map(|tensor| check.there(tensor, dtype));
        let (gate, up, dh) = (gate?, up?, dh?);
        let found = glu::backward(&dh, &gate, &up, activation)?;
        let forward = glu::forward(&gate, &up, activation)?;
        for (part, found, right) in [
            ("forward", &forward, &right.h),
            ("again", &found.h, &right.h),
            ("d gate", &found.d_gate, &right.d_gate),
            ("d up", &found.d_up, &right.d_up),
        ] {
            check.compare(name(&format!("{of} {part} {shape:?}"), dtype), found, right, tolerance(dtype))?;
        }
    }
    Ok(())
}

/// Prompts with branches, a sequence by itself, and one whose last rows alone ask.
fn segments(unit: usize) -> (Segments, usize, usize) {
    let causal = |rows: Range<usize>| Segment { queries: rows.clone(), prefix: 0..0, own: rows };
    let branch = |prefix: Range<usize>, rows: Range<usize>| Segment { queries: rows.clone(), prefix, own: rows };
    let u = unit;
    let groups = vec![
        vec![causal(0..3 * u), branch(0..3 * u, 3 * u..5 * u + 1), branch(0..3 * u, 5 * u + 1..8 * u)],
        vec![causal(8 * u..11 * u + 3)],
        vec![Segment { queries: 11 * u + 3..12 * u, prefix: 0..0, own: 11 * u + 3..14 * u }],
    ];
    (Segments::new(groups), 12 * u, 14 * u)
}

fn attentions(check: &mut Check, dtype: DType) -> Result<()> {
    let unit = if check.small { 5 } else { 90 };
    let (segments, queries, keys) = segments(unit);
    let plain = Heads { queries: 4, keys: 2, dimension: 64, scale: 0.125, softcap: None, window: None };
    let kinds = [
        ("", plain),
        (" with a cap", Heads { softcap: Some(2.0), ..plain }),
        (" in a window", Heads { window: Some(unit + 3), ..plain }),
        (", heads of 20 alone", Heads { queries: 3, keys: 3, dimension: 20, scale: 0.22, ..plain }),
    ];
    for (kind, heads) in kinds {
        let (of_q, of_k) = (heads.queries * heads.dimension, heads.keys * heads.dimension);
        let [q, d_out] = [0; 2].map(|_| check.normal((queries, of_q), dtype));
        let [k, v] = [0; 2].map(|_| check.normal((keys, of_k), dtype));
        let (q, k, v, d_out) = (q?, k?, v?, d_out?);
        let saved = attention::forward(&q, &k, &v, heads, &segments)?;
        let (dq, dk, dv) = attention::backward(&d_out, &q, &k, &v, &saved, heads, &segments)?;
        let [q, k, v, d_out] = [&q, &k, &v, &d_out].map(|tensor| check.there(tensor, dtype));
        let (q, k, v, d_out) = (q?, k?, v?, d_out?);
        let found = attention::forward(&q, &k, &v, heads, &segments)?;
        let (gq, gk, gv) = attention::backward(&d_out, &q, &k, &v, &found, heads, &segments)?;
        for (part, found, right) in [
            ("forward", &found.output, &saved.output),
            ("log-sum-exp", &found.log_sum_exp, &saved.log_sum_exp),
            ("dq", &gq, &dq),
            ("dk", &gk, &dk),
            ("dv", &gv, &dv),
        ] {
            check.compare(name(&format!("attention {part}{kind}"), dtype), found, right, tolerance(dtype))?;
        }
    }
    Ok(())
}

fn heads(check: &mut Check, dtype: DType) -> Result<()> {
    // more rows than are held at once, and a vocabulary that is no multiple of a packet
    let cases = if check.small {
        [(9, 40, 301, None), (5, 24, 512, Some(1.5))]
    } else {
        [(1100, 512, 32003, None), (513, 256, 50304, Some(4.0))]
    };
    for (count, width, vocabulary, softcap) in cases {
        let hidden = check.normal((count, width), dtype)?;
        let weight = (check.normal((vocabulary, width), dtype)? * 0.25)?;
        let targets: Vec<u32> = (0..count).map(|i| (i * 977 % vocabulary) as u32).collect();
        let slopes = check.normal(count, DType::F32)?.to_vec1::<f64>()?;
        let (there, gweight) = (check.there(&hidden, dtype)?, check.there(&weight, dtype)?);
        let (weight, gweight) = (Weight::Dense(weight), Weight::Dense(gweight));
        let (right, u) =
            completion_logps::score(&hidden, Head { weight: &weight, softcap }, &targets, Want::Gradient)?;
        let head = Head { weight: &gweight, softcap };
        let (found, gu) = completion_logps::score(&there, head, &targets, Want::Gradient)?;
        let (alone, _) = completion_logps::score(&there, head, &targets, Want::Scores)?;
        let what = |part: &str| name(&format!("head {part} [{count}, {vocabulary}]"), dtype);
        let column =
            |of: &dyn Fn(usize) -> f64| Tensor::from_vec((0..count).map(of).collect::<Vec<_>>(), count, &Device::Cpu);
        // logits are f32 sums of the same products whatever the elements
        let most = tolerance(DType::F32);
        check.compare(what("log-prob"), &column(&|i| found[i].logp)?, &column(&|i| right[i].logp)?, most)?;
        check.compare(what("log-prob alone"), &column(&|i| alone[i].logp)?, &column(&|i| right[i].logp)?, most)?;
        check.compare(
            what("entropy"),
            &column(&|i| found[i].entropy)?,
            &column(&|i| right[i].entropy)?,
            10.0 * most,
        )?;
        // means nearly cancel
        check.compare(
            what("mean logit"),
            &column(&|i| found[i].mean_logit)?,
            &column(&|i| right[i].mean_logit)?,
            1e-3,
        )?;
        let tops = found.iter().zip(&right).filter(|(a, b)| a.top1 != b.top1).count();
        check.note(what("top 1"), tops as f64 / count as f64, 0.0);
        let best = |of: &[TokenScore]| column(&|i| of[i].best_logp);
        check.compare(what("best log-prob"), &best(&found)?, &best(&right)?, most)?;
        let others = found.iter().zip(&right).filter(|(a, b)| a.best != b.best).count();
        check.note(what("best"), others as f64 / count as f64, 0.0);
        if let (Some(u), Some(gu)) = (u, gu) {
            check.compare(what("U"), &gu, &u, tolerance(dtype))?;
            let (right, found) =
                (completion_logps::backward(&u, &slopes)?, completion_logps::backward(&gu, &slopes)?);
            check.compare(what("backward"), &found, &right, tolerance(dtype))?;
        }
    }
    Ok(())
}

/// Every type of block, whole and by rows, in both orders of rows.
fn blocks(check: &mut Check, dtype: DType) -> Result<()> {
    let kinds = BlockType::ALL.iter().map(|(_, _, kind)| Kept::Blocks(*kind)).chain([Kept::Nf4]);
    for kept in kinds {
        if matches!(kept, Kept::Blocks(kind) if kind.block_size() == 1) {
            continue;
        }
        // NF4's blocks go over the ends of rows
        let (count, columns) = if kept == Kept::Nf4 { (24, 1160) } else { (24, 1792) };
        let values = (check.normal((count, columns), DType::F32)? * 0.02)?.to_dtype(DType::F32)?;
        let weight = kept.keep(count, columns, values.flatten_all()?.to_vec1()?)?;
        let label = match kept {
            Kept::Blocks(kind) => kind.to_string(),
            _ => "NF4".to_owned(),
        };
        let Weight::Quantized(quantized) = weight else { continue };
        for (order, quantized) in [("", quantized.clone()), (", heads in pairs", quantized.unpaired(8))] {
            let weight = Weight::Quantized(Quantized::clone(&quantized));
            let resident = Resident::new(&weight, &check.device, &Recent::new(0))?;
            let Some(resident) = resident else { continue };
            // the same arithmetic in f32, so the same numbers but for a product that is fused with a sum
            let most = if dtype == DType::F32 { 1e-6 } else { tolerance(dtype) };
            let right = weight.dense(DType::F32)?;
            check.compare(name(&format!("{label}{order}"), dtype), &resident.dense(dtype)?, &right, most)?;
            let ids = [7, 0, 23, 7];
            let right = weight.gather(&ids, DType::F32)?;
            check.compare(
                name(&format!("{label} by rows{order}"), dtype),
                &resident.gather(&ids, dtype)?,
                &right,
                most,
            )?;
            few(check, &format!("{label}{order}"), &weight, Weight::OnDevice(resident), dtype)?;
        }
    }
    Ok(())
}

/// As many rows by a matrix in blocks as a step of generation may have, alone and onto a residual.
fn few(check: &mut Check, label: &str, here: &Weight, there: Weight, dtype: DType) -> Result<()> {
    let (width, inner) = here.dims()?;
    let here = Weight::Dense(here.dense(DType::F64)?);
    for count in [1, 3, 16] {
        let (x, residual) = (check.normal((count, inner), dtype)?, check.normal((count, width), dtype)?);
        let branch = |weight| [Branch { weight, bias: None, update: None }];
        let ([right], _) = linear::forward(&x, &branch(&here), None)?;
        let ([onto], _) = linear::forward(&x, &branch(&here), Some(&residual))?;
        let (x, residual) = (check.there(&x, dtype)?, check.there(&residual, dtype)?);
        let ([found], _) = linear::forward(&x, &branch(&there), None)?;
        let ([found_onto], _) = linear::forward(&x, &branch(&there), Some(&residual))?;
        let what = |part: &str| name(&format!("{label}, {count} rows{part}"), dtype);
        check.compare(what(""), &found, &right, tolerance(dtype))?;
        check.compare(what(" onto a residual"), &found_onto, &onto, tolerance(dtype))?;
    }
    Ok(())
}

fn linears(check: &mut Check, dtype: DType) -> Result<()> {
    let (count, inner, widths) = if check.small { (70, 48, [72, 40, 9]) } else { (1030, 1024, [2056, 520, 1003]) };
    let ranks = [16, 5];
    let row_keys: Vec<u64> = (0..count as u64).collect();
    let x = check.normal((count, inner), dtype)?;
    let residual = check.normal((count, widths[0]), dtype)?;
    let bias = check.normal(widths[0], dtype)?;
    let mut matrices = Vec::new();
    for width in widths {
        matrices.push(((check.normal((width, inner), dtype)? * 0.1)?, check.normal((count, width), dtype)?));
    }
    let mut adapters = Vec::new();
    for (rank, width) in ranks.into_iter().zip([widths[0], widths[2]]) {
        // their copies for products are of the elements' type
        adapters.push(((check.normal((rank, inner), dtype)? * 0.1)?, check.normal((width, rank), dtype)?));
    }
    for (kind, probability) in [("", 0.0), (" under dropout", 0.25)] {
        let dropout = (probability > 0.0).then(|| Dropout { probability, key: 5, rows: &row_keys });
        let run = |x: &Tensor,
                   dys: &[Tensor],
                   weights: &[Weight],
                   pairs: &[(Tensor, Tensor)],
                   bias: &Tensor,
                   onto: &Tensor| {
            let update = |i: usize, scale| {
                let (a, b): &(Tensor, Tensor) = &pairs[i];
                Some(LowRank { a, b, scale, dropout, magnitude: None })
            };
            let branches = [
                Branch { weight: &weights[0], bias: Some(bias), update: update(0, 1.5) },
                Branch { weight: &weights[1], bias: None, update: None },
                Branch { weight: &weights[2], bias: None, update: update(1, -0.5) },
            ];
            let (y, inner) = linear::forward(x, &branches, None)?;
            let ([added], _) = linear::forward(x, &[branches[0]], Some(onto))?;
            let dy = [&dys[0], &dys[1], &dys[2]];
            let (dx, gradients) = linear::backward(dy, &branches, x, inner.as_ref(), true)?;
            let mut all: Vec<(String, Tensor)> = Vec::new();
            all.extend(y.into_iter().enumerate().map(|(i, y)| (format!("y {i}"), y)));
            all.push(("y onto a residual".to_owned(), added));
            all.extend(inner.map(|inner| ("x A".to_owned(), inner)));
            all.extend(dx.map(|dx| ("dx".to_owned(), dx)));
            for (i, LowRankGradient { a, b, .. }) in gradients.into_iter().flatten().enumerate() {
                all.extend([(format!("dA {i}"), a), (format!("dB {i}"), b)]);
            }
            Ok::<_, candle_core::Error>(all)
        };
        let here: Vec<Weight> = matrices.iter().map(|(w, _)| Weight::Dense(w.clone())).collect();
        let dys: Vec<Tensor> = matrices.iter().map(|(_, dy)| dy.clone()).collect();
        let right = run(&x, &dys, &here, &adapters, &bias, &residual)?;
        let there = |tensor: &Tensor| check.there(tensor, dtype);
        let weights = matrices.iter().map(|(w, _)| there(w).map(Weight::Dense)).collect::<Result<Vec<_>>>()?;
        let dys = dys.iter().map(there).collect::<Result<Vec<_>>>()?;
        let wide = |tensor: &Tensor| check.there(tensor, DType::F32);
        let pairs = adapters.iter().map(|(a, b)| Ok((wide(a)?, wide(b)?))).collect::<Result<Vec<_>>>()?;
        let found = run(&there(&x)?, &dys, &weights, &pairs, &there(&bias)?, &there(&residual)?)?;
        for ((part, found), (_, right)) in found.iter().zip(&right) {
            check.compare(name(&format!("linear {part}{kind}"), dtype), found, right, tolerance(dtype))?;
        }
    }
    Ok(())
}

fn gathers(check: &mut Check, dtype: DType) -> Result<()> {
    let (x, onto) = (check.normal((6, 40), dtype)?, check.normal((9, 40), dtype)?);
    let ids = [8, 0, 8, 3, 0, 1];
    let (gx, gonto) = (check.there(&x, dtype)?, check.there(&onto, dtype)?);
    check.compare(name("rows taken", dtype), &rows::gather(&gonto, &ids)?, &rows::gather(&onto, &ids)?, 0.0)?;
    let (found, right) = (rows::scatter_add(&gonto, &ids, &gx)?, rows::scatter_add(&onto, &ids, &x)?);
    check.compare(name("rows added", dtype), &found, &right, tolerance(dtype))
}

/// Some updates of a small model's adapters, LoRA+ and decay among them, with clipping.
fn optimizers(check: &mut Check) -> Result<()> {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
    });
    let wrapped = |error: String| candle_core::Error::Msg(error);
    let config = family::from_json(Path::new("config.json"), config).map_err(|e| wrapped(e.to_string()))?;
    let lora = LoraConfig { rank: 3, ..LoraConfig::default() };
    let mut here =
        adapter::new(&lora, &config.modules(), 1, DType::F32, &Device::Cpu).map_err(|e| wrapped(e.to_string()))?;
    let mut there = here.clone().to_device(&check.device)?;
    let (mut one, mut two) = (AdamW::new(&here)?, AdamW::new(&there)?);
    for step in 0..4 {
        let rate = Rate { learning_rate: 0.01, loraplus_ratio: 4.0, weight_decay: 0.1 };
        let shapes: Vec<_> = here.tensors().map(|(_, tensor)| tensor.shape().clone()).collect();
        let mut gradients = Vec::new();
        for shape in shapes {
            gradients.push(check.normal(shape, DType::F32)?.to_dtype(DType::F32)?);
        }
        let mut copies = gradients.iter().map(|g| g.to_device(&check.device)).collect::<Result<Vec<_>>>()?;
        let (right, found) = (optimizer::clip(&mut gradients, 1.0)?, optimizer::clip(&mut copies, 1.0)?);
        check.note(format!("gradient norm, update {step}"), (found - right).abs() / right, 1e-6);
        let updated = one.step(&here, &gradients, rate)?;
        here.replace(updated)?;
        let updated = two.step(&there, &copies, rate)?;
        there.replace(updated)?;
    }
    let flat = |tensors: Vec<Tensor>| {
        let flat =
            tensors.iter().map(|tensor| tensor.to_device(&Device::Cpu)?.flatten_all()).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&flat, 0)
    };
    let parameters =
        |adapters: &adapter::Adapters| flat(adapters.tensors().map(|(_, tensor)| tensor.clone()).collect());
    check.compare("AdamW, parameters", &parameters(&there)?, &parameters(&here)?, 1e-5)?;
    let firsts = |adamw: &AdamW| flat(adamw.moments().iter().map(|m| m.first.clone()).collect());
    let seconds = |adamw: &AdamW| flat(adamw.moments().iter().map(|m| m.second.clone()).collect());
    check.compare("AdamW, first moments", &firsts(&two)?, &firsts(&one)?, 1e-5)?;
    check.compare("AdamW, second moments", &seconds(&two)?, &seconds(&one)?, 1e-5)
}
