//! Frozen matrices over one input, each with an optional low-rank update: `y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ` (Hu et al.
//! 2021, <https://arxiv.org/abs/2106.09685>).
//!
//! Nothing of the size of `W` is ever formed besides `W`: the update acts through `[T, R]`, and the frozen matrix gets
//! no gradient. Matrices that read the same input (q, k and v; gate and up) go together: their `A` are one matrix, so
//! that the input is read once for all of them, and the gradient of the input is summed in one place.

use candle_core::{Result, Tensor};

use super::cpu::few::{self, FEW};
use super::cpu::gemm::{Matrix, Onto, Threads, gemm, product};
use super::cpu::weight::{Rows, panels};
use super::cpu::{Real, Values, filled, for_real, tensor, values};
#[cfg(feature = "cuda")]
use super::cuda::linear::{self as cuda, Narrow};
use super::dropout::{self, Dropout};
#[cfg(feature = "cuda")]
use super::on_gpu;
use super::{dims2, has_kernel};
use crate::quant::Weight;

/// The update `s B A` of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[R, in]`
    pub a: &'a Tensor,
    /// `[out, R]`
    pub b: &'a Tensor,
    /// `s`: `alpha / rank`, or `alpha / √rank` for rsLoRA.
    pub scale: f64,
    /// Dropout on the update's input.
    pub dropout: Option<Dropout<'a>>,
    /// DoRA: what the rows of `W + s B A` are brought to the length of. Not together with dropout.
    pub magnitude: Option<Magnitude<'a>>,
}

/// Lengths of the rows of a matrix with its update: `y_j = length_j / norm_j · ((W + s B A) x)_j`. The norm is held
/// constant in the gradient (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>, section 4.3).
#[derive(Debug, Clone, Copy)]
pub struct Magnitude<'a> {
    /// Trained, `[out]`.
    pub length: &'a Tensor,
    /// `‖W + s B A‖` of each row, `[out]`.
    pub norm: &'a Tensor,
}

impl Magnitude<'_> {
    /// In the type of what they multiply.
    fn factors(&self, like: &Tensor) -> Result<Tensor> {
        (self.length / self.norm)?.to_dtype(like.dtype())
    }
}

impl LowRank<'_> {
    /// What `A` is applied to.
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(dropout) => dropout::apply(x, dropout),
            None => Ok(x.clone()),
        }
    }
}

/// One matrix, with its update if it has one.
#[derive(Debug, Clone, Copy)]
pub struct Branch<'a> {
    /// `[out, in]`
    pub weight: &'a Weight,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// The adapter.
    pub update: Option<LowRank<'a>>,
}

/// Gradients of one update.
#[derive(Debug, Clone)]
pub struct LowRankGradient {
    /// `[R, in]`
    pub a: Tensor,
    /// `[out, R]`
    pub b: Tensor,
    /// Of DoRA's lengths, `[out]`.
    pub magnitude: Option<Tensor>,
}

/// The updates of some branches, stacked: `A` one below the other, `x Aᵀ` side by side.
struct Stack<'a, const N: usize> {
    updates: [Option<LowRank<'a>>; N],
    /// First column of each update in `x Aᵀ`, and the end of the last.
    columns: Vec<usize>,
}

impl<'a, const N: usize> Stack<'a, N> {
    /// `None` where no branch has an update.
    fn of(branches: &[Branch<'a>; N]) -> Result<Option<Self>> {
        let updates = branches.map(|branch| branch.update);
        let mut columns = vec![0];
        let mut end = 0;
        for update in &updates {
            end += update.map_or(Ok(0), |update| Ok::<_, candle_core::Error>(dims2(update.a)?.0))?;
            columns.push(end);
        }
        Ok((end > 0).then_some(Self { updates, columns }))
    }

    fn rank(&self) -> usize {
        self.columns[N]
    }

    fn with_columns(&self) -> impl Iterator<Item = (usize, &LowRank<'a>, std::ops::Range<usize>)> {
        let ranges = self.columns.windows(2).map(|ends| ends[0]..ends[1]);
        self.updates
            .iter()
            .zip(ranges)
            .enumerate()
            .filter_map(|(i, (update, range))| Some((i, update.as_ref()?, range)))
    }

    fn has_dropout(&self) -> bool {
        self.updates.iter().flatten().any(|update| update.dropout.is_some())
    }

    /// `[ΣR, in]`
    fn a(&self) -> Result<Tensor> {
        Tensor::cat(&self.updates.iter().flatten().map(|update| update.a).collect::<Vec<_>>(), 0)
    }

    /// `drop(x) Aᵀ [T, ΣR]`
    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_dropout() {
            let one = |update: &LowRank<'_>| {
                let x = update.input(x)?;
                #[cfg(feature = "cuda")]
                if on_gpu(&x) {
                    return cuda::matmul_t(&x, update.a);
                }
                x.matmul(&update.a.t()?)
            };
            return Tensor::cat(&self.updates.iter().flatten().map(one).collect::<Result<Vec<_>>>()?, 1);
        }
        matmul_t(x, &self.a()?)
    }
}

/// `x wᵀ`
fn matmul_t(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_gpu(x) {
        return cuda::matmul_t(x, w);
    }
    if has_kernel(x) {
        return for_real!(x, T => {
            let (x, w) = (mat::<T>(x)?, mat(w)?);
            if x.rows <= FEW {
                let (shape, mut y) = ((x.rows, w.rows), vec![T::of(0.0); x.rows * w.rows]);
                few::add(&mut y, 1.0, &x.each(0..x.columns), &Rows::Dense(w.values, w.columns), w.rows);
                return tensor(y, shape);
            }
            tensor(product(x.get(), w.get().t()), (x.rows, w.rows))
        });
    }
    x.matmul(&w.t()?)
}

/// `y [T, out]` of `x [T, in]` for each branch, `residual [T, out]` added to it; and, where there are updates,
/// `drop(x) Aᵀ [T, ΣR]`, which backward needs.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward<const N: usize>(
    x: &Tensor,
    branches: &[Branch<'_>; N],
    residual: Option<&Tensor>,
) -> Result<([Tensor; N], Option<Tensor>)> {
    let stack = Stack::of(branches)?;
    let inner = stack.as_ref().map(|stack| stack.inner(x)).transpose()?;
    let mut outputs = Vec::with_capacity(N);
    for (i, branch) in branches.iter().enumerate() {
        let columns = stack.as_ref().map_or(0..0, |stack| stack.columns[i]..stack.columns[i + 1]);
        let update = branch.update.as_ref().zip(inner.as_ref()).map(|(update, inner)| (update, inner, columns));
        outputs.push(one(x, branch, update, residual)?);
    }
    Ok((array(outputs)?, inner))
}

type Update<'u> = (&'u LowRank<'u>, &'u Tensor, std::ops::Range<usize>);

fn one(x: &Tensor, branch: &Branch<'_>, update: Option<Update<'_>>, residual: Option<&Tensor>) -> Result<Tensor> {
    let Branch { weight, bias, .. } = branch;
    if let Some((Some(magnitude), update)) = update.as_ref().map(|update| (update.0.magnitude, update)) {
        let y = bare(x, weight, update)?;
        let mut y = y.broadcast_mul(&magnitude.factors(&y)?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
        }
        return residual.map_or(Ok(y.clone()), |residual| residual + y);
    }
    #[cfg(feature = "cuda")]
    if on_gpu(x) {
        let y = cuda::product_t(x, weight, *bias, residual)?;
        if let Some((update, inner, columns)) = update {
            cuda::add_low_rank(&y, inner, columns, update.b, Narrow::B, update.scale)?;
        }
        return Ok(y);
    }
    if has_kernel(x) {
        return for_real!(x, T => {
            let (x, width) = (mat::<T>(x)?, weight.dims()?.0);
            let start = match (residual, bias) {
                (Some(residual), bias) => Some(added::<T>(&values(residual)?, *bias, width)?),
                (None, Some(bias)) => Some(repeated::<T>(&values(bias)?, x.rows)),
                (None, None) => None,
            };
            let zero = || vec![T::of(0.0); x.rows * width];
            if x.rows <= FEW {
                let mut y = start.unwrap_or_else(zero);
                few::add(&mut y, 1.0, &x.each(0..x.columns), &Rows::of(weight)?, width);
                if let Some((update, inner, columns)) = update {
                    let (inner, b) = (mat::<T>(inner)?, mat(update.b)?);
                    few::add(&mut y, update.scale, &inner.each(columns), &Rows::Dense(b.values, b.columns), width);
                }
                return tensor(y, (x.rows, width));
            }
            let mut y = match (start, weight) {
                (None, Weight::Dense(weight)) => product(x.get(), mat(weight)?.get().t()),
                (start, _) => {
                    let mut y = start.unwrap_or_else(zero);
                    panels(weight, None, |rows, w| {
                        gemm(&mut y[rows.start..], width, Onto::Existing, 1.0, x.get(), w.t(), Threads::All);
                    })?;
                    y
                }
            };
            if let Some((update, inner, columns)) = update {
                let (inner, b) = (mat::<T>(inner)?, mat(update.b)?);
                gemm(&mut y, width, Onto::Existing, update.scale, inner.columns(columns), b.get().t(), Threads::All);
            }
            tensor(y, (x.rows, width))
        });
    }
    let mut y = x.matmul(&weight.dense(x.dtype())?.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some((update, inner, columns)) = update {
        let inner = inner.narrow(1, columns.start, columns.len())?;
        y = (y + (inner.matmul(&update.b.t()?)? * update.scale)?)?;
    }
    residual.map_or(Ok(y.clone()), |residual| residual + y)
}

/// `(W + s B A) x`
fn bare(x: &Tensor, weight: &Weight, (update, inner, columns): &Update<'_>) -> Result<Tensor> {
    let plain = LowRank { magnitude: None, ..**update };
    one(x, &Branch { weight, bias: None, update: None }, Some((&plain, inner, columns.clone())), None)
}

/// `x Wᵀ [T, out]`
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn apply(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    one(x, &Branch { weight, bias: None, update: None }, None, None)
}

/// The gradient of what the matrices with their updates gave, before DoRA brought it to its lengths.
fn before_lengths<const N: usize>(dy: [&Tensor; N], branches: &[Branch<'_>; N]) -> Result<[Tensor; N]> {
    let scaled = |(dy, branch): (&Tensor, &Branch<'_>)| match branch.update.and_then(|update| update.magnitude) {
        Some(magnitude) => dy.broadcast_mul(&magnitude.factors(dy)?),
        None => Ok(dy.clone()),
    };
    array(dy.into_iter().zip(branches).map(scaled).collect::<Result<Vec<_>>>()?)
}

/// The gradient of `x` if it is `wanted`, summed over the branches, and of each update. `inner` is what [`forward`] gave
/// (computed again where it was not kept), `x` its input, before dropout.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward<const N: usize>(
    dy: [&Tensor; N],
    branches: &[Branch<'_>; N],
    x: &Tensor,
    inner: Option<&Tensor>,
    wanted: bool,
) -> Result<(Option<Tensor>, [Option<LowRankGradient>; N])> {
    let g = between(dy, branches)?;
    let gradients = update_gradients(dy, branches, g.as_ref(), x, inner)?;
    let dx = if wanted { Some(input_gradient(dy, branches, g.as_ref())?) } else { None };
    Ok((dx, gradients))
}

/// `G = s dy B [T, ΣR]`: the gradient between `B` and `A`, where there are updates.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn between<const N: usize>(dy: [&Tensor; N], branches: &[Branch<'_>; N]) -> Result<Option<Tensor>> {
    let Some(stack) = Stack::of(branches)? else { return Ok(None) };
    let dy = before_lengths(dy, branches)?;
    let dy = dy.each_ref();
    if dy.iter().all(|dy| has_kernel(dy)) {
        return for_real!(dy[0], T => {
            let (rows, rank) = (dims2(dy[0])?.0, stack.rank());
            let mut g = vec![T::of(0.0); rows * rank];
            for (i, update, columns) in stack.with_columns() {
                let (dy, b) = (mat::<T>(dy[i])?, mat(update.b)?);
                let onto = &mut g[columns.start..];
                gemm(onto, rank, Onto::Nothing, update.scale, dy.get(), b.get(), Threads::All);
            }
            tensor(g, (rows, rank)).map(Some)
        });
    }
    let one = |(i, update, _): (usize, &LowRank<'_>, _)| {
        #[cfg(feature = "cuda")]
        if on_gpu(dy[i]) {
            let all = 0..dims2(dy[i])?.1;
            return cuda::matmul(dy[i], all, update.b, update.scale);
        }
        dy[i].matmul(update.b)? * update.scale
    };
    Tensor::cat(&stack.with_columns().map(one).collect::<Result<Vec<_>>>()?, 1).map(Some)
}

/// `dx = Σ dy W + drop(G A)`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn input_gradient<const N: usize>(
    dy: [&Tensor; N],
    branches: &[Branch<'_>; N],
    g: Option<&Tensor>,
) -> Result<Tensor> {
    let stack = Stack::of(branches)?.zip(g);
    let dy = before_lengths(dy, branches)?;
    let dy = dy.each_ref();
    let update = match &stack {
        Some((stack, g)) if !stack.has_dropout() => Some((*g, stack.a()?)),
        _ => None,
    };
    let mut dx = sum_of_products(dy, branches, update.as_ref().map(|(g, a)| (*g, a)))?;
    let Some((stack, g)) = stack.filter(|_| update.is_none()) else { return Ok(dx) };
    for (_, update, columns) in stack.with_columns() {
        let mut back = times_a(g, columns, update.a)?;
        if let Some(dropout) = &update.dropout {
            back = dropout::apply(&back, dropout)?;
        }
        dx = (dx + back)?;
    }
    Ok(dx)
}

/// `dA = Gᵀ drop(x)` and `dB = s dyᵀ (drop(x) Aᵀ)` of each update.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn update_gradients<const N: usize>(
    dy: [&Tensor; N],
    branches: &[Branch<'_>; N],
    g: Option<&Tensor>,
    x: &Tensor,
    inner: Option<&Tensor>,
) -> Result<[Option<LowRankGradient>; N]> {
    let mut gradients = [const { None }; N];
    let Some((stack, g)) = Stack::of(branches)?.zip(g) else { return Ok(gradients) };
    let inner = inner.map_or_else(|| stack.inner(x), |inner| Ok(inner.clone()))?;
    let mut lengths = [const { None }; N];
    for (i, update, columns) in stack.with_columns() {
        if let Some(Magnitude { norm, .. }) = update.magnitude {
            // computed again rather than kept: one product more for each matrix that has lengths
            let bare = bare(x, branches[i].weight, &(update, &inner, columns))?;
            lengths[i] = Some(((dy[i] * bare)?.to_dtype(norm.dtype())?.sum(0)? / norm)?);
        }
    }
    let dy = before_lengths(dy, branches)?;
    let dy = dy.each_ref();
    if has_kernel(x) && !stack.has_dropout() {
        for_real!(x, T => {
            let (x, g, inner) = (mat::<T>(x)?, mat::<T>(g)?, mat::<T>(&inner)?);
            let da = product(g.get().t(), x.get());
            for (i, update, columns) in stack.with_columns() {
                let (dy, shape) = (mat::<T>(dy[i])?, dims2(update.b)?);
                let mut b = vec![T::of(0.0); shape.0 * shape.1];
                let inner = inner.columns(columns.clone());
                gemm(&mut b, shape.1, Onto::Nothing, update.scale, dy.get().t(), inner, Threads::All);
                let a = da[columns.start * x.columns..columns.end * x.columns].to_vec();
                let (a, b) = (tensor(a, update.a.shape())?, tensor(b, shape)?);
                gradients[i] = Some(LowRankGradient { a, b, magnitude: lengths[i].take() });
            }
        });
        return Ok(gradients);
    }
    #[cfg(feature = "cuda")]
    if on_gpu(x) {
        for (i, update, columns) in stack.with_columns() {
            let (of_x, of_dy) = (0..dims2(x)?.1, 0..dims2(dy[i])?.1);
            let a = cuda::outer(g, columns.clone(), &update.input(x)?, of_x, 1.0)?;
            let b = cuda::outer(dy[i], of_dy, &inner, columns, update.scale)?;
            gradients[i] = Some(LowRankGradient { a, b, magnitude: lengths[i].take() });
        }
        return Ok(gradients);
    }
    for (i, update, columns) in stack.with_columns() {
        let part = |of: &Tensor| of.narrow(1, columns.start, columns.len());
        let a = part(g)?.t()?.matmul(&update.input(x)?)?;
        let b = (dy[i].t()?.matmul(&part(&inner)?)? * update.scale)?;
        gradients[i] = Some(LowRankGradient { a, b, magnitude: lengths[i].take() });
    }
    Ok(gradients)
}

/// Some columns of `g`, times `a`.
fn times_a(g: &Tensor, columns: std::ops::Range<usize>, a: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_gpu(g) {
        return cuda::matmul(g, columns, a, 1.0);
    }
    g.narrow(1, columns.start, columns.len())?.matmul(a)
}

/// `Σ dy W`, and `G A`
fn sum_of_products<const N: usize>(
    dy: [&Tensor; N],
    branches: &[Branch<'_>; N],
    update: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let mut terms = dy.into_iter().zip(branches.iter().map(|branch| branch.weight));
    #[cfg(feature = "cuda")]
    if dy.iter().all(|dy| on_gpu(dy)) {
        let dx = cuda::sum_of_products(terms)?;
        if let Some((g, a)) = update {
            cuda::add_low_rank(&dx, g, 0..dims2(g)?.1, a, Narrow::A, 1.0)?;
        }
        return Ok(dx);
    }
    let Some((first, weight)) = terms.next() else { candle_core::bail!("no branch") };
    if has_kernel(first) {
        return for_real!(first, T => {
            let (rows, columns) = (dims2(first)?.0, weight.dims()?.1);
            let onto = |dx: &mut [T], dy: &Tensor, weight: &Weight| {
                let dy = mat::<T>(dy)?;
                panels(weight, None, |rows, w| {
                    gemm(dx, columns, Onto::Existing, 1.0, dy.columns(rows), w, Threads::All);
                })
            };
            let mut dx = match weight {
                Weight::Dense(weight) => product(mat::<T>(first)?.get(), mat(weight)?.get()),
                _ => {
                    let mut dx = vec![T::of(0.0); rows * columns];
                    onto(&mut dx, first, weight)?;
                    dx
                }
            };
            for (dy, weight) in terms {
                onto(&mut dx, dy, weight)?;
            }
            if let Some((g, a)) = update {
                let (g, a) = (mat::<T>(g)?, mat(a)?);
                gemm(&mut dx, columns, Onto::Existing, 1.0, g.get(), a.get(), Threads::All);
            }
            tensor(dx, (rows, columns))
        });
    }
    let first = first.matmul(&weight.dense(first.dtype())?)?;
    let dx = terms.try_fold(first, |sum, (dy, weight)| sum + dy.matmul(&weight.dense(dy.dtype())?)?)?;
    update.map_or(Ok(dx.clone()), |(g, a)| dx + g.matmul(a)?)
}

/// A residual with a bias on every row.
fn added<T: Real>(residual: &[T], bias: Option<&Tensor>, width: usize) -> Result<Vec<T>> {
    let bias = bias.map(|bias| values::<T>(bias)).transpose()?;
    let [y] = filled(residual.len(), width, |row, [y]| {
        y.copy_from_slice(&residual[row * width..][..y.len()]);
        for (y, &b) in y.iter_mut().zip(bias.iter().flat_map(|bias| bias.iter())) {
            *y += b;
        }
    });
    Ok(y)
}

fn repeated<T: Real>(bias: &[T], rows: usize) -> Vec<T> {
    let [y] = filled(rows * bias.len(), bias.len(), |_, [y]| y.copy_from_slice(bias));
    y
}

fn array<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| candle_core::Error::Msg("one output a branch".into()))
}

/// A borrowed matrix and its size.
struct Borrowed<'t, T> {
    values: Values<'t, T>,
    rows: usize,
    columns: usize,
}

fn mat<T: Real>(tensor: &Tensor) -> Result<Borrowed<'_, T>> {
    let (rows, columns) = dims2(tensor)?;
    Ok(Borrowed { values: values(tensor)?, rows, columns })
}

impl<T: Real> Borrowed<'_, T> {
    fn get(&self) -> Matrix<'_, T> {
        Matrix::new(&self.values, self.rows, self.columns)
    }

    /// Some columns of each row.
    fn each(&self, columns: std::ops::Range<usize>) -> Vec<&[T]> {
        self.values.chunks_exact(self.columns.max(1)).map(|row| &row[columns.clone()]).collect()
    }

    fn columns(&self, columns: std::ops::Range<usize>) -> Matrix<'_, T> {
        Matrix::strided(&self.values[columns.start..], self.rows, columns.len(), self.columns)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    const ROWS: [u64; 6] = [3, 1, 4, 1, 5, 9];

    /// Three matrices over `x [6, 5]`: with an update of rank 2, without, with one of rank 3.
    struct Case {
        x: Tensor,
        residual: Tensor,
        weights: [Weight; 3],
        bias: Option<Tensor>,
        a: [Tensor; 2],
        b: [Tensor; 2],
        dy: [Tensor; 3],
        dropout: Option<Dropout<'static>>,
        /// Of the first update: DoRA's lengths, and norms that are held constant.
        lengths: Option<[Tensor; 2]>,
    }

    fn case(dropout: Option<Dropout<'static>>, bias: bool) -> Result<Case> {
        Ok(Case {
            x: normal(1, (6, 5))?,
            residual: normal(8, (6, 7))?,
            weights: [normal(2, (7, 5))?, normal(12, (7, 5))?, normal(22, (7, 5))?].map(Weight::Dense),
            bias: bias.then(|| normal(3, 7)).transpose()?,
            a: [normal(4, (2, 5))?, normal(14, (3, 5))?],
            b: [normal(5, (7, 2))?, normal(15, (7, 3))?],
            dy: [normal(6, (6, 7))?, normal(16, (6, 7))?, normal(26, (6, 7))?],
            dropout,
            lengths: None,
        })
    }

    impl Case {
        fn branches(&self) -> [Branch<'_>; 3] {
            let update = |i: usize, scale| {
                let lengths = self.lengths.as_ref().filter(|_| i == 0);
                let magnitude = lengths.map(|[length, norm]| Magnitude { length, norm });
                Some(LowRank { a: &self.a[i], b: &self.b[i], scale, dropout: self.dropout, magnitude })
            };
            let branch = |i: usize, update| Branch { weight: &self.weights[i], bias: self.bias.as_ref(), update };
            [branch(0, update(0, 1.7)), branch(1, None), branch(2, update(1, -0.6))]
        }

        fn value(&self) -> Result<Tensor> {
            let (y, _) = forward(&self.x, &self.branches(), Some(&self.residual))?;
            let along = |i: usize| (&y[i] * &self.dy[i])?.sum_all();
            along(0)? + along(1)? + along(2)?
        }

        fn backward(&self) -> Result<(Tensor, Vec<Tensor>)> {
            let (_, inner) = forward(&self.x, &self.branches(), None)?;
            let dy = [&self.dy[0], &self.dy[1], &self.dy[2]];
            let (dx, gradients) = backward(dy, &self.branches(), &self.x, inner.as_ref(), true)?;
            assert!(gradients[1].is_none());
            let gradients = gradients
                .into_iter()
                .flatten()
                .flat_map(|LowRankGradient { a, b, magnitude }| [Some(a), Some(b), magnitude]);
            // those of the lengths last
            let mut gradients: Vec<_> = gradients.flatten().collect();
            if self.lengths.is_some() {
                let lengths = gradients.remove(2);
                gradients.push(lengths);
            }
            Ok((dx.expect("it was wanted"), gradients))
        }
    }

    fn lengths(case: Case) -> Result<Case> {
        Ok(Case { lengths: Some([normal(31, 7)?, (normal(32, 7)?.abs()? + 0.5)?]), ..case })
    }

    fn check_gradients(dropout: Option<Dropout<'static>>, bias: bool, dora: bool) -> Result<()> {
        let case = || if dora { lengths(case(dropout, bias)?) } else { case(dropout, bias) };
        let (dx, gradients) = case()?.backward()?;
        finite_difference(&case()?.x, &dx, |x| Case { x: x.clone(), ..case()? }.value())?;
        for i in 0..2 {
            finite_difference(&case()?.a[i], &gradients[2 * i], |a| {
                let mut case = case()?;
                case.a[i] = a.clone();
                case.value()
            })?;
            finite_difference(&case()?.b[i], &gradients[2 * i + 1], |b| {
                let mut case = case()?;
                case.b[i] = b.clone();
                case.value()
            })?;
        }
        if let Some([length, norm]) = case()?.lengths {
            finite_difference(&length, &gradients[4], |length| {
                Case { lengths: Some([length.clone(), norm.clone()]), ..case()? }.value()
            })?;
        }
        Ok(())
    }

    const DROPOUT: Dropout<'static> = Dropout { probability: 0.4, key: 11, rows: &ROWS };

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        check_gradients(None, false, false)?;
        check_gradients(None, true, false)?;
        composed(|| check_gradients(None, true, false))
    }

    #[test]
    fn backward_of_lengths_agrees_with_finite_differences() -> Result<()> {
        check_gradients(None, false, true)?;
        check_gradients(None, true, true)?;
        composed(|| check_gradients(None, true, true))
    }

    #[test]
    fn backward_agrees_with_finite_differences_under_dropout() -> Result<()> {
        check_gradients(Some(DROPOUT), false, false)
    }

    #[test]
    fn without_updates_only_the_input_has_a_gradient_and_only_if_it_is_wanted() -> Result<()> {
        let case = case(None, true)?;
        let bare = case.branches().map(|branch| Branch { update: None, ..branch });
        let dy = [&case.dy[0], &case.dy[1], &case.dy[2]];
        let (dx, gradients) = backward(dy, &bare, &case.x, None, true)?;
        assert!(gradients.iter().all(Option::is_none));
        finite_difference(&case.x, &dx.expect("it was wanted"), |x| {
            let (y, _) = forward(x, &bare, None)?;
            ((&y[0] * dy[0])? + (&y[1] * dy[1])?)?.sum_all()? + (&y[2] * dy[2])?.sum_all()?
        })?;
        let (_, inner) = forward(&case.x, &case.branches(), None)?;
        let (dx, gradients) = backward(dy, &case.branches(), &case.x, inner.as_ref(), false)?;
        assert!(dx.is_none() && gradients[0].is_some());
        Ok(())
    }

    /// Merging must equal not merging: `W + s B A` applied to `x`, with a scale that is not one, so that a scale on
    /// the base weight would show.
    #[test]
    fn merged_equals_unmerged() -> Result<()> {
        let case = case(None, false)?;
        let update = LowRank { a: &case.a[0], b: &case.b[0], scale: 2.5, dropout: None, magnitude: None };
        let branch = Branch { weight: &case.weights[0], bias: None, update: Some(update) };
        let merged = (case.weights[0].dense(DType::F64)? + (case.b[0].matmul(&case.a[0])? * 2.5)?)?;
        let ([y], _) = forward(&case.x, &[branch], None)?;
        close(&y, &case.x.matmul(&merged.t()?)?, 1e-14)
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        for (dropout, bias, dora) in
            [(None, false, false), (None, true, false), (Some(DROPOUT), true, false), (None, true, true)]
        {
            let case = if dora { lengths(case(dropout, bias)?)? } else { case(dropout, bias)? };
            let all = || {
                let (plain, inner) = forward(&case.x, &case.branches(), None)?;
                let (onto, _) = forward(&case.x, &case.branches(), Some(&case.residual))?;
                let (dx, gradients) = case.backward()?;
                Ok(plain.into_iter().chain(onto).chain(inner).chain([dx]).chain(gradients).collect::<Vec<_>>())
            };
            all()?.iter().zip(&composed(all)?).try_for_each(|(kernel, plain)| close(kernel, plain, 1e-14))?;
        }
        Ok(())
    }

    #[test]
    fn an_update_with_b_zero_changes_no_bit() -> Result<()> {
        let case = case(None, false)?;
        let single = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let weight = Weight::Dense(case.weights[0].dense(DType::F32)?);
        let x = single(&case.x)?;
        let (a, b) = (single(&case.a[0])?, single(&case.b[0].zeros_like()?)?);
        let with = |update| {
            Ok::<_, candle_core::Error>(forward(&x, &[Branch { weight: &weight, bias: None, update }], None)?.0)
        };
        let [on] = with(Some(LowRank { a: &a, b: &b, scale: 2.0, dropout: None, magnitude: None }))?;
        let [off] = with(None)?;
        assert_eq!(on.to_vec2::<f32>()?, off.to_vec2::<f32>()?);
        Ok(())
    }
}
