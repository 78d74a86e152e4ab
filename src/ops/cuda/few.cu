// A few rows by a matrix in its blocks, as a step of generation has them: what it takes is the time to read the blocks, once.
//
// A warp makes one column of the result, a lane eight neighbours of the matrix's row at a time. Sums are f32, in one order
// whatever other rows there are, so an answer is the same whatever is generated beside it.
#include "blocks.cuh"

// The most rows; FEW in ops/cpu/few.rs.
constexpr int MOST = 16;
// Pieces of the matrix's row that a lane asks for before it uses one.
constexpr int AHEAD = 4;

// `y = x Wᵀ`, or `y += x Wᵀ` where it is `onto` what is there; `eight` reads from the matrix's row.
template <typename T, typename Eight>
__device__ __forceinline__ void few(const T* x, T* y, int onto, int rows, int outputs, int columns, int output, Eight eight) {
    float sums[MOST] = {};
    int lane = threadIdx.x % WARP;
    for (int first = lane * 8; first < columns; first += AHEAD * WARP * 8) {
        float w[AHEAD][8];
#pragma unroll
        for (int piece = 0; piece < AHEAD; piece++) {
            int column = first + piece * WARP * 8;
            if (column < columns) eight(column, columns - column < 8 ? columns - column : 8, w[piece]);
        }
#pragma unroll
        for (int row = 0; row < MOST; row++) {
            if (row >= rows) break;
#pragma unroll
            for (int piece = 0; piece < AHEAD; piece++) {
                int column = first + piece * WARP * 8;
                if (column >= columns) break;
                float values[8];
                load(values, x + (long long)row * columns + column, columns - column);
#pragma unroll
                for (int i = 0; i < 8; i++) sums[row] += w[piece][i] * values[i];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < MOST; row++) {
        if (row >= rows) break;
        float sum = warp_sum(sums[row]);
        if (lane == 0) {
            T* to = y + (long long)row * outputs + output;
            *to = from_float<T>(onto ? to_float(*to) + sum : sum);
        }
    }
}

// The warp's column of the result.
__device__ __forceinline__ int this_output() { return (int)(((long long)blockIdx.x * blockDim.x + threadIdx.x) / WARP); }

template <typename B, typename T>
__device__ void few_blocks(const byte* blocks, const T* x, T* y, int onto, int paired, int rows, int outputs, int columns) {
    int output = this_output();
    if (output >= outputs) return;
    const byte* row = blocks + source_row(output, nullptr, paired) * (columns / B::SIZE) * B::BYTES;
    few(x, y, onto, rows, outputs, columns, output, [=](int column, int, float (&w)[8]) {
        B::eight(row + (long long)(column / B::SIZE) * B::BYTES, column % B::SIZE, w);
    });
}

template <typename T>
__device__ void few_nf4(Nf4 matrix, const T* x, T* y, int onto, int paired, int rows, int outputs, int columns) {
    const float* values_of = nf4_values();
    int output = this_output();
    if (output >= outputs) return;
    long long first = source_row(output, nullptr, paired) * columns;
    few(x, y, onto, rows, outputs, columns, output,
        [=](int column, int count, float (&w)[8]) { matrix.eight(values_of, first + column, count, w); });
}

#define BLOCKS(B, TYPE, T, NAME)                                                                                         \
    extern "C" __global__ void few_##TYPE##_##NAME(const byte* blocks, const T* x, T* y, int onto, int paired, int rows, \
                                                   int outputs, int columns) {                                           \
        few_blocks<B>(blocks, x, y, onto, paired, rows, outputs, columns);                                               \
    }
#define FEW(T, NAME)                                                                                                     \
    FOR_EACH_BLOCK(BLOCKS, T, NAME)                                                                                      \
    extern "C" __global__ void few_nf4_##NAME(const byte* packed, const byte* quantized, const float* code,              \
                                              const float* scales, float offset, const T* x, T* y, int onto, int paired, \
                                              int rows, int outputs, int columns) {                                      \
        few_nf4(Nf4{packed, quantized, code, scales, offset}, x, y, onto, paired, rows, outputs, columns);               \
    }
FEW(float, f32)
FEW(bf16, bf16)
