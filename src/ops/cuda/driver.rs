//! What talks to the driver: kernels launched, cuBLAS called, memory handed out before it is written. All `unsafe` code of
//! the CUDA kernels is here.
//!
//! Everything goes to one stream, in order, so nothing has to be waited for but what the host reads. Sizes are checked on
//! this side of a launch; that a launch fits its kernel's parameters is held by `src/bin/gpu_check`, which runs every
//! kernel against the CPU.

use candle_core::cuda_backend::cudarc::cublas::sys as blas;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, result, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};
use half::bf16;

/// A file of kernels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module {
    name: &'static str,
    ptx: &'static str,
}

macro_rules! modules {
    ($($name:ident),*) => {
        $(
            #[expect(non_upper_case_globals, reason = "named as the file")]
            pub(in crate::ops::cuda) const $name: Module = Module {
                name: concat!("dpo-lora-", stringify!($name)),
                ptx: include_str!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".ptx")),
            };
        )*
        /// All files of kernels.
        pub(in crate::ops::cuda) const MODULES: &[Module] = &[$($name),*];
    };
}

/// The files beside this one, compiled by `build.rs`.
pub(super) mod modules {
    use super::Module;
    modules!(adamw, attention, completion_logps, dequantize, few, glu, low_rank, norm, rope, rows);
}

/// A kernel's argument.
#[derive(Debug, Clone, Copy)]
enum Argument {
    Address(u64),
    I32(i32),
    I64(i64),
    F32(f32),
}

/// A kernel about to be launched; arguments in the order of its parameters.
#[derive(Debug)]
pub(super) struct Launch<'t> {
    module: Module,
    kernel: String,
    device: CudaDevice,
    arguments: Vec<Argument>,
    /// Held until the launch is queued.
    tensors: std::marker::PhantomData<&'t Tensor>,
}

impl<'t> Launch<'t> {
    /// The kernel of that name for elements of `dtype`: `norm_forward` is `norm_forward_bf16`.
    pub(super) fn of(module: Module, kernel: &str, like: &Tensor) -> Result<Self> {
        let suffix = match like.dtype() {
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            other => bail!("there is no CUDA kernel for {other:?}"),
        };
        Self::named(module, format!("{kernel}_{suffix}"), like.device())
    }

    pub(super) fn named(module: Module, kernel: String, device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        Ok(Self { module, kernel, device, arguments: Vec::new(), tensors: std::marker::PhantomData })
    }

    /// A tensor that is read or written, all of it.
    pub(super) fn tensor(mut self, tensor: &'t Tensor) -> Result<Self> {
        self.arguments.push(Argument::Address(address(tensor)?));
        Ok(self)
    }

    /// A tensor, or a null pointer.
    pub(super) fn optional(mut self, tensor: Option<&'t Tensor>) -> Result<Self> {
        self.arguments.push(Argument::Address(tensor.map_or(Ok(0), address)?));
        Ok(self)
    }

    /// A number of rows, columns or the like.
    pub(super) fn count(mut self, count: usize) -> Result<Self> {
        let Ok(count) = i32::try_from(count) else { bail!("{}: {count} is more than a kernel counts", self.kernel) };
        self.arguments.push(Argument::I32(count));
        Ok(self)
    }

    /// A number of elements.
    pub(super) fn long(mut self, count: usize) -> Self {
        self.arguments.push(Argument::I64(count as i64));
        self
    }

    pub(super) fn float(mut self, value: f64) -> Self {
        self.arguments.push(Argument::F32(value as f32));
        self
    }

    /// Launches `grid` blocks of `block` threads, if there are any.
    pub(super) fn run(self, grid: [usize; 2], block: [u32; 2]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let (Ok(x), Ok(y)) = (u32::try_from(grid[0]), u16::try_from(grid[1])) else {
            bail!("{}: a grid of {grid:?} is more than a launch takes", self.kernel)
        };
        let function = self.device.get_or_load_custom_func(&self.kernel, self.module.name, self.module.ptx)?;
        let mut builder = function.builder();
        for argument in &self.arguments {
            match argument {
                Argument::Address(value) => builder.arg(value),
                Argument::I32(value) => builder.arg(value),
                Argument::I64(value) => builder.arg(value),
                Argument::F32(value) => builder.arg(value),
            };
        }
        let config =
            LaunchConfig { grid_dim: (x, u32::from(y), 1), block_dim: (block[0], block[1], 1), shared_mem_bytes: 0 };
        // SAFETY: addresses are those of live tensors on this stream; the ops in this folder check shapes before they come
        // here, and pass what the kernel's parameters are.
        #[expect(unsafe_code, reason = "a launch is a foreign call")]
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// Threads of a block where each takes some elements.
pub(super) const THREADS: u32 = 256;
/// Elements that a thread takes; `LANES` in `common.cuh`.
pub(super) const LANES: usize = 8;

/// Threads of a warp; in `common.cuh`.
pub(super) const WARP: usize = 32;

/// The grid of a kernel in which every thread takes [`LANES`] of `count` elements.
pub(super) fn grid(count: usize) -> [usize; 2] {
    [count.div_ceil(LANES).div_ceil(THREADS as usize), 1]
}

/// Where a contiguous tensor begins on the device.
fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a CUDA kernel was given a tensor that is not contiguous: {:?}", tensor.shape())
    };
    let Storage::Cuda(cuda) = &*storage else { bail!("a CUDA kernel was given a tensor on {:?}", tensor.device()) };
    let stream = cuda.device.cuda_stream();
    let base = match tensor.dtype() {
        DType::BF16 => cuda.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::F32 => cuda.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::F64 => cuda.as_cuda_slice::<f64>()?.device_ptr(&stream).0,
        DType::U32 => cuda.as_cuda_slice::<u32>()?.device_ptr(&stream).0,
        DType::U8 => cuda.as_cuda_slice::<u8>()?.device_ptr(&stream).0,
        other => bail!("a CUDA kernel was given a tensor of {other:?}"),
    };
    Ok(base + (start * tensor.dtype().size_in_bytes()) as u64)
}

/// A tensor that a kernel is about to write, every element of it.
pub(super) fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    // an empty allocation has no address
    if shape.elem_count() == 0 || is_poisoned() {
        return poisoned(shape, dtype, device);
    }
    // SAFETY: the caller writes all of it before anything reads it.
    #[expect(unsafe_code, reason = "memory is handed out before it is written")]
    unsafe {
        Tensor::empty(shape, dtype, device)
    }
}

thread_local! {
    static POISON: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn is_poisoned() -> bool {
    POISON.get()
}

/// Runs `f` with outputs that are NaN before a kernel writes them, so that an element which is left out shows.
pub fn with_poison<R>(f: impl FnOnce() -> R) -> R {
    POISON.set(true);
    let result = f();
    POISON.set(false);
    result
}

fn poisoned(shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
    match dtype {
        DType::BF16 => Tensor::full(bf16::NAN, shape, device),
        DType::F32 => Tensor::full(f32::NAN, shape, device),
        _ => Tensor::zeros(shape, dtype, device),
    }
}

/// A matrix of a product, or one of a batch of them, within a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'t> {
    pub(super) tensor: &'t Tensor,
    /// Where the first matrix begins, in elements.
    pub(super) start: usize,
    /// Elements from one row to the next, as it lies in memory.
    pub(super) row: usize,
    /// Elements from one matrix of the batch to the next.
    pub(super) batch: usize,
    /// Whether the product takes it transposed.
    pub(super) transposed: bool,
}

impl<'t> Operand<'t> {
    /// A whole matrix.
    pub(super) fn of(tensor: &'t Tensor) -> Result<Self> {
        let (_, columns) = tensor.dims2()?;
        Ok(Self { tensor, start: 0, row: columns, batch: 0, transposed: false })
    }

    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Some of its columns.
    pub(super) fn columns(self, from: usize) -> Self {
        Self { start: self.start + from, ..self }
    }

    /// Whether `count` matrices that the product takes as `[rows, columns]` are within the tensor.
    fn check(&self, rows: usize, columns: usize, count: usize) -> Result<u64> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let end = self.start + self.batch * (count - 1) + self.row * (rows - 1) + columns;
        if columns > self.row || end > self.tensor.elem_count() {
            bail!("a product of [{rows}, {columns}] is not within a tensor of {:?}", self.tensor.shape())
        }
        Ok(address(self.tensor)? + (self.start * self.tensor.dtype().size_in_bytes()) as u64)
    }

    fn operation(&self) -> blas::cublasOperation_t {
        if self.transposed { blas::cublasOperation_t::CUBLAS_OP_T } else { blas::cublasOperation_t::CUBLAS_OP_N }
    }
}

fn blas_type(tensor: &Tensor) -> Result<blas::cudaDataType_t> {
    match tensor.dtype() {
        DType::BF16 => Ok(blas::cudaDataType_t::CUDA_R_16BF),
        DType::F32 => Ok(blas::cudaDataType_t::CUDA_R_32F),
        other => bail!("no product of {other:?}"),
    }
}

/// Whether a product replaces what is there or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Onto {
    Nothing,
    Existing,
}

/// `c [m, n] = scale · a [m, k] · b [k, n]`, `count` of them, or added to what is in `c`. Sums are f32, whatever the
/// elements; `c` may have wider ones than `a` and `b`.
pub(super) fn gemm(
    [m, n, k]: [usize; 3],
    a: Operand<'_>,
    b: Operand<'_>,
    c: Operand<'_>,
    count: usize,
    scale: f64,
    onto: Onto,
) -> Result<()> {
    if [m, n, count].contains(&0) {
        return Ok(());
    }
    if k == 0 {
        bail!("a product over nothing")
    }
    let (at_a, at_b, at_c) = (a.check(m, k, count)?, b.check(k, n, count)?, c.check(m, n, count)?);
    let device = c.tensor.device().as_cuda_device()?;
    device.cuda_stream().context().bind_to_thread().w()?;
    let (scale, beta) = (scale as f32, if onto == Onto::Existing { 1.0f32 } else { 0.0 });
    let [rows, columns, inner] = [m, n, k].map(|size| size as i32);
    // cuBLAS has columns where we have rows: cᵀ = bᵀ aᵀ
    // SAFETY: each operand was checked to lie within its tensor; the handle's stream is the tensors' own.
    #[expect(unsafe_code, reason = "cuBLAS is a foreign library")]
    unsafe {
        blas::cublasGemmStridedBatchedEx(
            *device.cublas_handle().handle(),
            b.operation(),
            a.operation(),
            columns,
            rows,
            inner,
            (&raw const scale).cast(),
            at_b as *const _,
            blas_type(b.tensor)?,
            b.row as i32,
            b.batch as i64,
            at_a as *const _,
            blas_type(a.tensor)?,
            a.row as i32,
            a.batch as i64,
            (&raw const beta).cast(),
            at_c as *mut _,
            blas_type(c.tensor)?,
            c.row as i32,
            c.batch as i64,
            count as i32,
            blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .result()
    .map_err(candle_core::Error::wrap)
}

/// What a driver said when a device was opened.
#[derive(Debug)]
pub enum Trouble {
    /// The driver does not start.
    NoDriver(String),
    /// It knows CUDA up to this version.
    TooOld(i32),
    /// So many devices are there, and not the one asked for.
    NoDevice(usize),
    /// The device's name and compute capability, of which the kernels are not.
    Architecture(String, i32, i32),
    /// Something else.
    Other(String),
}

/// A device that computes, with its name and compute capability.
#[derive(Debug)]
pub struct Opened {
    /// The device.
    pub device: Device,
    /// As the driver calls it.
    pub name: String,
    /// `(9, 0)` is Hopper.
    pub capability: (i32, i32),
    /// Bytes that are free, and all of them.
    pub memory: (usize, usize),
}

/// The CUDA version that the toolkit and its libraries are of, as the driver counts: 13.0 is 13000.
const CUDA_VERSION: i32 = 13000;
/// The oldest capability that bf16 products and these kernels are for.
const OLDEST: (i32, i32) = (8, 0);

/// Opens a device, sets it up, and loads every file of kernels, so that what cannot work says so at once.
///
/// # Errors
/// See [`Trouble`].
pub fn open(ordinal: usize) -> std::result::Result<Opened, Trouble> {
    result::init().map_err(|e| match e.0 {
        sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => Trouble::NoDevice(0),
        _ => Trouble::NoDriver(format!("{e}")),
    })?;
    let mut version = 0;
    // SAFETY: the driver writes one number.
    #[expect(unsafe_code, reason = "the driver is a foreign library")]
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
    asked.map_err(|e| Trouble::NoDriver(format!("{e}")))?;
    if version < CUDA_VERSION {
        return Err(Trouble::TooOld(version));
    }
    let there = result::device::get_count().map_err(|e| Trouble::NoDriver(format!("{e}")))? as usize;
    if ordinal >= there {
        return Err(Trouble::NoDevice(there));
    }
    let other = |e: String| Trouble::Other(e);
    // a stream of its own, which all threads of the process share
    let device = Device::new_cuda_with_stream(ordinal).map_err(|e| other(e.to_string()))?;
    let cuda = device.as_cuda_device().map_err(|e| other(e.to_string()))?.clone();
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let name = context.name().map_err(|e| other(e.to_string()))?;
    let capability = context.compute_capability().map_err(|e| other(e.to_string()))?;
    if capability < OLDEST {
        return Err(Trouble::Architecture(name, capability.0, capability.1));
    }
    // SAFETY: there is one stream, and nothing is used on another.
    #[expect(unsafe_code, reason = "events between streams are of no use here, and cost two calls an allocation")]
    unsafe {
        cuda.disable_event_tracking();
    }
    keep_freed_memory(ordinal).map_err(|e| other(e.to_string()))?;
    for module in modules::MODULES {
        let (_, kernel) = module.ptx.split_once(".entry ").unwrap_or_default();
        let kernel: String = kernel.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if let Err(error) = cuda.get_or_load_custom_func(&kernel, module.name, module.ptx) {
            let text = error.to_string();
            return Err(match () {
                () if text.contains("NO_BINARY_FOR_GPU") || text.contains("INVALID_PTX") => {
                    Trouble::Architecture(name, capability.0, capability.1)
                }
                () if text.contains("UNSUPPORTED_PTX_VERSION") => Trouble::TooOld(version),
                () => Trouble::Other(text),
            });
        }
    }
    // candle's own kernels may be built for another architecture than ours
    if let Err(error) = Tensor::zeros(1, DType::F32, &device).and_then(|zero| zero.affine(1.0, 1.0)) {
        let text = error.to_string();
        return Err(match text.contains("NO_BINARY_FOR_GPU") || text.contains("PTX") {
            true => Trouble::Architecture(name, capability.0, capability.1),
            false => Trouble::Other(text),
        });
    }
    let memory = context.mem_get_info().map_err(|e| other(e.to_string()))?;
    Ok(Opened { device, name, capability, memory })
}

/// Tensors that are freed stay with the process: otherwise every number that the host reads gives the pool back to the
/// system.
fn keep_freed_memory(ordinal: usize) -> std::result::Result<(), result::DriverError> {
    let device = result::device::get(ordinal as i32)?;
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a number of 64 bits.
    #[expect(unsafe_code, reason = "the driver is a foreign library")]
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut all).cast())
    }
}

/// The most bytes of tensors that were there at once since the start, or since the last call with `reset`.
///
/// # Errors
/// What the driver returns.
pub fn peak_memory(device: &Device, reset: bool) -> Result<usize> {
    let cuda = device.as_cuda_device()?;
    cuda.cuda_stream().synchronize().w()?;
    let mut peak = 0u64;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute is a number of 64 bits; only zero may be written.
    #[expect(unsafe_code, reason = "the driver is a foreign library")]
    unsafe {
        let pool = result::device::get_default_mem_pool(cuda.cuda_stream().context().cu_device()).w()?;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut peak).cast()).w()?;
        if reset {
            let mut zero = 0u64;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast()).w()?;
        }
    }
    Ok(peak as usize)
}

/// Bytes that are free on the device.
///
/// # Errors
/// What the driver returns.
pub fn free_memory(device: &Device) -> Result<usize> {
    Ok(device.as_cuda_device()?.cuda_stream().context().mem_get_info().w()?.0)
}
