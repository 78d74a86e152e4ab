// RMSNorm over rows. A row is taken by the threads of `threadIdx.x`; a block takes `blockDim.y` rows.
#include "common.cuh"

template <typename T>
__device__ void scale_row(const T* x, const float* weight, T* y, int width, float rho) {
    for (int column = threadIdx.x * LANES; column < width; column += blockDim.x * LANES) {
        int count = width - column;
        float values[LANES], weights[LANES];
        load(values, x + column, count);
        load(weights, weight + column, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) values[i] = values[i] * rho * weights[i];
        store(y + column, values, count);
    }
}

// y = w x rho, rho = (mean x^2 + epsilon)^-1/2
template <typename T>
__device__ void norm_forward(const T* x, const float* weight, T* y, float* rho, int rows, int width, float epsilon) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += (long long)row * width;
    float sum = 0.0f;
    for (int column = threadIdx.x * LANES; column < width; column += blockDim.x * LANES) {
        float values[LANES];
        load(values, x + column, width - column);
#pragma unroll
        for (int i = 0; i < LANES; i++) sum += values[i] * values[i];
    }
    float scale = 1.0f / sqrtf(block_sum(sum) / (float)width + epsilon);
    if (threadIdx.x == 0) rho[row] = scale;
    scale_row(x, weight, y + (long long)row * width, width, scale);
}

template <typename T>
__device__ void norm_again(const T* x, const float* weight, const float* rho, T* y, int rows, int width) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    scale_row(x + (long long)row * width, weight, y + (long long)row * width, width, rho[row]);
}

// dx = onto + rho (w dy) - x rho^3 / width <w dy, x>; onto may be null
template <typename T>
__device__ void norm_backward(const T* dy, const T* x, const float* weight, const float* rho, const T* onto, T* dx,
                              int rows, int width) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long start = (long long)row * width;
    float along = 0.0f, scale = rho[row];
    for (int column = threadIdx.x * LANES; column < width; column += blockDim.x * LANES) {
        int count = width - column;
        float gradients[LANES], values[LANES], weights[LANES];
        load(gradients, dy + start + column, count);
        load(values, x + start + column, count);
        load(weights, weight + column, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) along += gradients[i] * weights[i] * values[i];
    }
    along = block_sum(along) * scale * scale * scale / (float)width;
    for (int column = threadIdx.x * LANES; column < width; column += blockDim.x * LANES) {
        int count = width - column;
        float gradients[LANES], values[LANES], weights[LANES], residual[LANES];
        load(gradients, dy + start + column, count);
        load(values, x + start + column, count);
        load(weights, weight + column, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) residual[i] = 0.0f;
        if (onto) load(residual, onto + start + column, count);
#pragma unroll
        for (int i = 0; i < LANES; i++) values[i] = residual[i] + gradients[i] * weights[i] * scale - values[i] * along;
        store(dx + start + column, values, count);
    }
}

#define NORM(T, NAME)                                                                                                    \
    extern "C" __global__ void norm_forward_##NAME(const T* x, const float* weight, T* y, float* rho, int rows,          \
                                                   int width, float epsilon) {                                           \
        norm_forward(x, weight, y, rho, rows, width, epsilon);                                                           \
    }                                                                                                                    \
    extern "C" __global__ void norm_again_##NAME(const T* x, const float* weight, const float* rho, T* y, int rows,      \
                                                 int width) {                                                            \
        norm_again(x, weight, rho, y, rows, width);                                                                      \
    }                                                                                                                    \
    extern "C" __global__ void norm_backward_##NAME(const T* dy, const T* x, const float* weight, const float* rho,      \
                                                    const T* onto, T* dx, int rows, int width) {                         \
        norm_backward(dy, x, weight, rho, onto, dx, rows, width);                                                        \
    }
NORM(float, f32)
NORM(bf16, bf16)
