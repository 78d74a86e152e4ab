//! Matrix products onto slices, through the crate `gemm` (the one candle uses on CPU).
//!
//! candle's own `matmul` always writes a fresh tensor. Adding a product onto an existing matrix, reading a head's
//! columns out of `[T, H·E]` without a copy and running one product a thread are what this wrapper is for.

use super::Real;

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// All of `data`, row-major.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Row-major with `row_stride` elements from one row to the next, beginning at the slice's first element.
    pub(crate) fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }.checked()
    }

    /// Transposed, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    fn checked(self) -> Self {
        let extent = extent(self.rows, self.columns, self.row_stride, self.column_stride);
        assert!(extent <= self.data.len(), "matrix reaches past its slice");
        self
    }
}

/// Elements from the first of a matrix to one past its last.
fn extent(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 }
}

/// What becomes of the values already at the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Onto {
    /// They are overwritten.
    Nothing,
    /// The product is added to them.
    Existing,
}

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread: inside a loop that is parallel itself.
    One,
    /// The whole pool.
    All,
}

/// `dst = scale · a b`, or `dst += scale · a b`; `dst` is row-major with `dst_stride` elements a row.
pub(crate) fn gemm<T: Real>(
    dst: &mut [T],
    dst_stride: usize,
    onto: Onto,
    scale: f64,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    threads: Threads,
) {
    let (m, n) = (a.rows, b.columns);
    assert!(extent(m, n, dst_stride, 1) <= dst.len(), "product reaches past its destination");
    assert!(n <= dst_stride || m <= 1, "rows of the destination overlap");
    // SAFETY: the destination holds all the product's elements, as was just checked, and they are initialised.
    #[expect(unsafe_code, reason = "the crate gemm takes raw pointers")]
    unsafe {
        multiply(dst.as_mut_ptr(), dst_stride, onto, scale, a, b, threads);
    }
}

/// `a b` as a new row-major matrix, computed by the whole pool.
pub(crate) fn product<T: Real>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
    let len = a.rows * b.columns;
    if a.columns == 0 {
        return vec![T::of(0.0); len];
    }
    let mut dst = Vec::with_capacity(len);
    // SAFETY: there is room for `len` elements, and a product that is not added onto anything writes each of them
    // without reading it.
    #[expect(unsafe_code, reason = "zeroing what is overwritten costs a tenth of a product")]
    unsafe {
        multiply(dst.as_mut_ptr(), b.columns, Onto::Nothing, 1.0, a, b, Threads::All);
        dst.set_len(len);
    }
    dst
}

/// # Safety
/// `dst` points to all elements of an `[a.rows, b.columns]` matrix of row stride `dst_stride`, which nothing else
/// reads or writes meanwhile; they are initialised if the product is added onto them.
#[expect(unsafe_code, reason = "the crate gemm takes raw pointers")]
unsafe fn multiply<T: Real>(
    dst: *mut T,
    dst_stride: usize,
    onto: Onto,
    scale: f64,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    threads: Threads,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions of a product differ");
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: the operands' extents were checked against their slices at construction, the element types are equal,
    // `dst` is the caller's promise, and all strides fit an isize because they are bounded by slice lengths.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            dst_stride as isize,
            onto == Onto::Existing,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::of(1.0),
            T::of(scale),
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_with_strides_transposes_and_accumulation() {
        // a is columns 1..3 of a 2x4 slice: [[1,2],[5,6]]; b is the transpose of [[1,0],[2,1]] = [[1,2],[0,1]]
        let a = [0.0, 1.0, 2.0, 9.0, 4.0, 5.0, 6.0, 9.0];
        let b = [1.0, 0.0, 2.0, 1.0];
        let mut dst = [100.0f64; 4];
        let left = Matrix::strided(&a[1..], 2, 2, 4);
        gemm(&mut dst, 2, Onto::Nothing, 1.0, left, Matrix::new(&b, 2, 2).t(), Threads::One);
        assert_eq!(dst, [1.0, 4.0, 5.0, 16.0]);
        gemm(&mut dst, 2, Onto::Existing, 0.5, left, Matrix::new(&b, 2, 2).t(), Threads::All);
        assert_eq!(dst, [1.5, 6.0, 7.5, 24.0]);
    }

    #[test]
    #[should_panic(expected = "past its slice")]
    fn a_matrix_larger_than_its_slice_is_refused() {
        let _ = Matrix::new(&[0.0f32; 5], 2, 3);
    }
}
