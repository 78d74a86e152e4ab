//! CPU kernels: loops over slices, generic over f32 and f64, parallel over rows or (segment, head).
//!
//! f32 is what training runs; f64 is the same code for finite differences. No kernel's result depends on the number
//! of threads: a reduction is always done by one thread in one order.

pub(crate) mod attention;
pub(crate) mod completion_logps;
mod exp;
pub(crate) mod few;
pub(crate) mod gemm;
pub(crate) mod glu;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod weight;

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{Device, Result, Shape, Storage, StorageRef, Tensor, WithDType, bail};
use num_traits::Float;
use rayon::prelude::*;

/// f32 or f64.
pub(crate) trait Real: WithDType + Float + std::iter::Sum {
    /// The value of an f64 constant.
    fn of(value: f64) -> Self {
        <Self as WithDType>::from_f64(value)
    }

    /// `exp`, in a form that a loop over a slice can be vectorised with.
    fn exp_in_loop(self) -> Self;

    /// f32 as they are, or converted for the tests that compute in f64.
    fn of_f32s<'s>(values: &'s [f32], converted: &'s mut Vec<Self>) -> &'s [Self];

    /// `Σ w x` for each of some `x` and each of some `w` of one length: `[X, W]` sums. Each is added up in the same order
    /// whatever others there are.
    fn dots<S: pulp::Simd, const W: usize, const X: usize>(
        simd: S,
        w: [&[Self]; W],
        x: [&[Self]; X],
    ) -> [[Self; W]; X];

    /// `tanh`, in the same form: `1 − 2 / (e^2x + 1)`.
    #[inline(always)]
    fn tanh_in_loop(self) -> Self {
        let one = Self::of(1.0);
        one - Self::of(2.0) / ((self + self).exp_in_loop() + one)
    }
}

impl Real for f32 {
    #[inline(always)]
    fn exp_in_loop(self) -> Self {
        exp::exp_f32(self)
    }

    fn of_f32s<'s>(values: &'s [f32], _: &'s mut Vec<Self>) -> &'s [Self] {
        values
    }

    few::dots!(as_simd_f32s, splat_f32s, mul_add_e_f32s, reduce_sum_f32s);
}

impl Real for f64 {
    #[inline(always)]
    fn exp_in_loop(self) -> Self {
        self.exp()
    }

    fn of_f32s<'s>(values: &'s [f32], converted: &'s mut Vec<Self>) -> &'s [Self] {
        converted.clear();
        converted.extend(values.iter().map(|&value| f64::from(value)));
        converted
    }

    few::dots!(as_simd_f64s, splat_f64s, mul_add_e_f64s, reduce_sum_f64s);
}

/// Runs `loops` compiled for the widest vector registers of this machine.
#[inline(always)]
pub(crate) fn vectorised<R>(loops: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(loops)
}

/// Runs `$body` with `$T` bound to the element type of `$tensor`.
macro_rules! for_real {
    ($tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => candle_core::bail!("no CPU kernel for {other:?}"),
        }
    };
}
pub(crate) use for_real;

/// The values of a contiguous CPU tensor, borrowed.
pub(crate) struct Values<'t, T> {
    storage: StorageRef<'t>,
    start: usize,
    end: usize,
    element: PhantomData<T>,
}

/// Borrows the values of a contiguous CPU tensor of element type `T`.
pub(crate) fn values<T: Real>(tensor: &Tensor) -> Result<Values<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a CPU kernel was given a tensor that is not contiguous: {:?}", tensor.shape())
    };
    match &*storage {
        Storage::Cpu(cpu) => _ = T::cpu_storage_as_slice(cpu)?,
        _ => bail!("a CPU kernel was given a tensor on {:?}", tensor.device()),
    }
    Ok(Values { storage, start, end, element: PhantomData })
}

impl<T: Real> Deref for Values<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let Storage::Cpu(cpu) = &*self.storage else { unreachable!("checked by values()") };
        let all = T::cpu_storage_as_slice(cpu).expect("checked by values()");
        &all[self.start..self.end]
    }
}

/// A CPU tensor that takes over `data`.
pub(crate) fn tensor<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// `N` vectors of `len` elements, written together a chunk at a time by the whole pool; a chunk is zero before.
///
/// Each task touches its own memory first: zeroing all of it beforehand would be one more pass, on one core.
pub(crate) fn filled<T: Real, const N: usize>(
    len: usize,
    chunk: usize,
    write: impl Fn(usize, [&mut [T]; N]) + Sync,
) -> [Vec<T>; N] {
    let mut vectors: [Vec<T>; N] = [const { Vec::new() }; N];
    let mut starts = [SendPtr(std::ptr::null_mut::<T>()); N];
    for (vector, start) in vectors.iter_mut().zip(&mut starts) {
        *vector = Vec::with_capacity(len);
        *start = SendPtr(vector.as_mut_ptr());
    }
    (0..len.div_ceil(chunk.max(1))).into_par_iter().for_each(|i| {
        let at = i * chunk;
        let count = chunk.min(len - at);
        // SAFETY: every vector has room for `len` elements; chunks do not overlap, so nothing else refers to this one;
        // all bits zero is a number.
        #[expect(unsafe_code, reason = "memory is handed out before it is initialised")]
        let chunks = starts.map(|start| unsafe {
            let first = start.get().add(at);
            first.write_bytes(0, count);
            std::slice::from_raw_parts_mut(first, count)
        });
        write(i, chunks);
    });
    for vector in &mut vectors {
        // SAFETY: the chunks cover `len` elements and each was zeroed at least.
        #[expect(unsafe_code, reason = "all elements were written above")]
        unsafe {
            vector.set_len(len);
        }
    }
    vectors
}

/// A pointer that tasks write disjoint parts through.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(*mut T);

impl<T> SendPtr<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The pointer. Through a method, so that a closure captures the whole, which may go to another thread.
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

// SAFETY: a pointer is only an address; whoever writes through it says why no other task does.
#[expect(unsafe_code, reason = "raw pointers are not Send by default")]
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "raw pointers are not Sync by default")]
unsafe impl<T: Send> Sync for SendPtr<T> {}

/// Independent partial sums of a reduction: wide enough for the compiler to use vector registers, and in a fixed
/// order, so that a sum is the same wherever and however often it is computed.
const LANES: usize = 16;

/// `Σ f(i)` over `0..len` with [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum_of<T: Real>(len: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::of(0.0); LANES];
    let blocks = len / LANES;
    for block in 0..blocks {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(block * LANES + lane);
        }
    }
    let mut total = T::of(0.0);
    for sum in lanes {
        total += sum;
    }
    for i in blocks * LANES..len {
        total += f(i);
    }
    total
}

/// `Σ a_i b_i`.
#[inline(always)]
pub(crate) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    sum_of(len, |i| a[i] * b[i])
}

/// The largest value; negative infinity for none.
#[inline(always)]
pub(crate) fn max_of<T: Real>(values: &[T]) -> T {
    let mut lanes = [T::neg_infinity(); LANES];
    let mut blocks = values.chunks_exact(LANES);
    for block in &mut blocks {
        for (lane, value) in lanes.iter_mut().zip(block) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let mut largest = T::neg_infinity();
    for value in lanes.iter().chain(blocks.remainder()) {
        largest = if *value > largest { *value } else { largest };
    }
    largest
}
