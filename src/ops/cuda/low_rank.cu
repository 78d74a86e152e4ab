// The tail of a product: a low-rank update added onto what the frozen matrix gave, `y += s u W`, with `u [rows, R]` narrow.
// Forward `W` is `B` transposed, backward `A`; both stay in f32, as the optimizer has them.
#include "common.cuh"

constexpr int TILE_ROWS = 64, TILE_COLUMNS = 64, DEPTH = 16, THREADS = 256;

// Element (r, column) of `w` is at `column * column_stride + r * rank_stride`. `u` is some columns of rows of `u_stride`.
template <typename T>
__device__ void add_low_rank(T* y, const T* u, const float* w, int rows, int columns, int rank, int u_stride,
                             long long column_stride, long long rank_stride, float scale) {
    __shared__ float left[TILE_ROWS][DEPTH + 1];
    __shared__ float right[DEPTH][TILE_COLUMNS];
    constexpr int ACROSS = TILE_COLUMNS / LANES, DOWN = TILE_ROWS * ACROSS / THREADS;
    int first_row = blockIdx.y * TILE_ROWS, first_column = blockIdx.x * TILE_COLUMNS;
    int column = (threadIdx.x % ACROSS) * LANES, row = threadIdx.x / ACROSS * DOWN;
    float sums[DOWN][LANES] = {};
    for (int start = 0; start < rank; start += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE_ROWS * DEPTH; i += THREADS) {
            int at = first_row + i / DEPTH, r = start + i % DEPTH;
            left[i / DEPTH][i % DEPTH] = at < rows && r < rank ? to_float(u[(long long)at * u_stride + r]) : 0.0f;
        }
        for (int i = threadIdx.x; i < DEPTH * TILE_COLUMNS; i += THREADS) {
            // neighbours in memory to neighbouring threads, whichever way the matrix lies
            int k = rank_stride == 1 ? i % DEPTH : i / TILE_COLUMNS;
            int c = rank_stride == 1 ? i / DEPTH : i % TILE_COLUMNS;
            int at = first_column + c, r = start + k;
            right[k][c] = at < columns && r < rank ? w[at * column_stride + r * rank_stride] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
#pragma unroll
            for (int j = 0; j < DOWN; j++) {
                float factor = left[row + j][k];
#pragma unroll
                for (int i = 0; i < LANES; i++) sums[j][i] += factor * right[k][column + i];
            }
        }
    }
    int count = columns - first_column - column;
    if (count <= 0) return;
#pragma unroll
    for (int j = 0; j < DOWN; j++) {
        int at = first_row + row + j;
        if (at >= rows) return;
        T* to = y + (long long)at * columns + first_column + column;
        float values[LANES];
        load(values, to, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) values[i] += scale * sums[j][i];
        store(to, values, count);
    }
}

#define LOW_RANK(T, NAME)                                                                                                \
    extern "C" __global__ void add_low_rank_##NAME(T* y, const T* u, const float* w, int rows, int columns, int rank,    \
                                                   int u_stride, long long column_stride, long long rank_stride,         \
                                                   float scale) {                                                        \
        add_low_rank(y, u, w, rows, columns, rank, u_stride, column_stride, rank_stride, scale);                         \
    }
LOW_RANK(float, f32)
LOW_RANK(bf16, bf16)
