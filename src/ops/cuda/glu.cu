// The gated linear unit `h = act(gate) up`, with `act(e) = e sigmoid(z(e))`.
#include "common.cuh"

struct Silu {
    static __device__ __forceinline__ float z(float e) { return e; }
    static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

struct GeluTanh {
    static constexpr float SLOPE = 1.5957691216057308f;  // sqrt(8 / pi)
    static constexpr float CUBIC = 0.044715f;
    static __device__ __forceinline__ float z(float e) { return SLOPE * e * (1.0f + CUBIC * e * e); }
    static __device__ __forceinline__ float slope(float e) { return SLOPE * (1.0f + 3.0f * CUBIC * e * e); }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename A, typename T>
__device__ void glu_forward(const T* gate, const T* up, T* h, long long count) {
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (at >= count) return;
    int left = count - at < LANES ? (int)(count - at) : LANES;
    float e[LANES], u[LANES];
    load(e, gate + at, left);
    load(u, up + at, left);
#pragma unroll
    for (int i = 0; i < LANES; i++) e[i] = e[i] * sigmoid(A::z(e[i])) * u[i];
    store(h + at, e, left);
}

// `h` again, and the gradients of gate and up
template <typename A, typename T>
__device__ void glu_backward(const T* dh, const T* gate, const T* up, T* h, T* d_gate, T* d_up, long long count) {
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (at >= count) return;
    int left = count - at < LANES ? (int)(count - at) : LANES;
    float g[LANES], e[LANES], u[LANES];
    load(g, dh + at, left);
    load(e, gate + at, left);
    load(u, up + at, left);
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        float sigma = sigmoid(A::z(e[i])), activated = e[i] * sigma;
        float slope = sigma * (1.0f + e[i] * (1.0f - sigma) * A::slope(e[i]));
        float of_gate = g[i] * u[i] * slope, of_up = g[i] * activated;
        u[i] = activated * u[i];
        e[i] = of_gate;
        g[i] = of_up;
    }
    store(h + at, u, left);
    store(d_gate + at, e, left);
    store(d_up + at, g, left);
}

#define GLU(A, ACT, T, NAME)                                                                                             \
    extern "C" __global__ void glu_forward_##ACT##_##NAME(const T* gate, const T* up, T* h, long long count) {           \
        glu_forward<A>(gate, up, h, count);                                                                              \
    }                                                                                                                    \
    extern "C" __global__ void glu_backward_##ACT##_##NAME(const T* dh, const T* gate, const T* up, T* h, T* d_gate,     \
                                                           T* d_up, long long count) {                                   \
        glu_backward<A>(dh, gate, up, h, d_gate, d_up, count);                                                           \
    }
GLU(Silu, silu, float, f32)
GLU(Silu, silu, bf16, bf16)
GLU(GeluTanh, gelu, float, f32)
GLU(GeluTanh, gelu, bf16, bf16)
