// Rows added to rows: `y[t] = onto[t] + Σ x[s]` over the sources `s` of row `t`, which are `sources[starts[t]..starts[t + 1]]`.
//
// A thread writes eight neighbours of a row. The sum is f32, in the order of the sources, and rounded once.
#include "common.cuh"

template <typename T>
__device__ void add_rows(const T* onto, const T* x, const unsigned* starts, const unsigned* sources, T* y, int rows,
                         int columns) {
    int chunks = (columns + LANES - 1) / LANES;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)rows * chunks) return;
    long long row = item / chunks;
    int column = (int)(item % chunks) * LANES, count = columns - column;
    float sums[LANES];
    load(sums, onto + row * columns + column, count);
    for (unsigned s = starts[row]; s < starts[row + 1]; s++) {
        float values[LANES];
        load(values, x + (long long)sources[s] * columns + column, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) sums[i] += values[i];
    }
    store(y + row * columns + column, sums, count);
}

#define ROWS(T, NAME)                                                                                                    \
    extern "C" __global__ void add_rows_##NAME(const T* onto, const T* x, const unsigned* starts,                        \
                                               const unsigned* sources, T* y, int rows, int columns) {                   \
        add_rows(onto, x, starts, sources, y, rows, columns);                                                            \
    }
ROWS(float, f32)
ROWS(bf16, bf16)
