// Frozen matrices out of their blocks, into scratch that cuBLAS multiplies by.
//
// A thread writes eight neighbours of a row. Rows may be some of the matrix (`ids`), and where llama.cpp's converter has put
// the halves of each head of `paired` rows between each other, they come out in Hugging Face's order.
#include "blocks.cuh"

template <typename B, typename T>
__device__ void dequantize(const byte* blocks, T* out, const unsigned* ids, int paired, int rows, int columns) {
    int chunks = columns / 8;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)rows * chunks) return;
    long long row = item / chunks;
    int column = (int)(item % chunks) * 8;
    long long block = source_row(row, ids, paired) * (columns / B::SIZE) + column / B::SIZE;
    float values[8];
    B::eight(blocks + block * B::BYTES, column % B::SIZE, values);
    store(out + row * columns + column, values, 8);
}

template <typename T>
__device__ void dequantize_nf4(Nf4 matrix, T* out, const unsigned* ids, int paired, int rows, int columns) {
    const float* values_of = nf4_values();
    int chunks = (columns + 7) / 8;
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)rows * chunks) return;
    long long row = item / chunks;
    int column = (int)(item % chunks) * 8, count = columns - column < 8 ? columns - column : 8;
    float values[8];
    matrix.eight(values_of, source_row(row, ids, paired) * columns + column, count, values);
    store(out + row * columns + column, values, count);
}

#define BLOCKS(B, TYPE, T, NAME)                                                                                         \
    extern "C" __global__ void dequantize_##TYPE##_##NAME(const byte* blocks, T* out, const unsigned* ids, int paired,   \
                                                          int rows, int columns) {                                       \
        dequantize<B>(blocks, out, ids, paired, rows, columns);                                                          \
    }
#define DEQUANTIZE(T, NAME)                                                                                              \
    FOR_EACH_BLOCK(BLOCKS, T, NAME)                                                                                      \
    extern "C" __global__ void dequantize_nf4_##NAME(const byte* packed, const byte* quantized, const float* code,       \
                                                     const float* scales, float offset, T* out, const unsigned* ids,     \
                                                     int paired, int rows, int columns) {                                \
        dequantize_nf4(Nf4{packed, quantized, code, scales, offset}, out, ids, paired, rows, columns);                   \
    }
DEQUANTIZE(float, f32)
DEQUANTIZE(bf16, bf16)
