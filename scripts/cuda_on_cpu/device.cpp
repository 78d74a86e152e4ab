// A CUDA driver, cuBLAS and cuRAND whose device is this machine's CPU: as much of them as candle and the kernels of this
// project call. Kernels are found by their name among those that `build` compiled from the same sources.
//
// It is a test bench, not a backend. Memory is not a number before something writes it and ends at a page that cannot be
// read, so that what a kernel leaves out or reads past its end shows.
#include "cuda.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

Dim threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------- fibers
extern "C" void fiber_switch(void** save, void* to);
asm(R"(
.globl fiber_switch
fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {
enum class State { Runs, WaitsForBlock, WaitsForWarp, Done };
constexpr size_t STACK = 1 << 16;
constexpr int WARP = 32;

struct Fiber {
    void* at = nullptr;
    State state = State::Done;
    Dim thread{};
    int turn = 0;
};

std::vector<Fiber> fibers;
char* stacks = nullptr;
void* scheduler = nullptr;
int current = 0;
// two, since a lane may already give its next value while another has not yet read the last
std::vector<uint64_t> given[2];
const std::function<void()>* body = nullptr;

void leave(State state) {
    fibers[current].state = state;
    fiber_switch(&fibers[current].at, scheduler);
}

void entry() {
    (*body)();
    leave(State::Done);
    std::abort();
}

void start(int i) {
    if (!stacks) {
        stacks = static_cast<char*>(
            mmap(nullptr, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    auto top = reinterpret_cast<uintptr_t>(stacks + STACK * (i + 1)) & ~uintptr_t(15);
    auto* slots = reinterpret_cast<void**>(top);
    // as if `entry` had been called: an address to return to lies above its frame
    *--slots = nullptr;
    *--slots = reinterpret_cast<void*>(entry);
    for (int r = 0; r < 6; r++) *--slots = nullptr;
    fibers[i].at = slots;
    fibers[i].state = State::Runs;
}

void run_block(int count) {
    for (int i = 0; i < count; i++) {
        int x = blockDim.x, y = blockDim.y;
        fibers[i].thread = Dim{unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)};
        fibers[i].turn = 0;
        start(i);
    }
    for (;;) {
        bool any = false;
        for (int i = 0; i < count; i++) {
            if (fibers[i].state != State::Runs) continue;
            any = true;
            current = i;
            threadIdx = fibers[i].thread;
            fiber_switch(&scheduler, fibers[i].at);
        }
        if (any) continue;
        // nobody can go on by himself
        bool released = false;
        for (int warp = 0; warp < count; warp += WARP) {
            int end = std::min(warp + WARP, count), waits = 0, alive = 0;
            for (int i = warp; i < end; i++) {
                waits += fibers[i].state == State::WaitsForWarp;
                alive += fibers[i].state != State::Done;
            }
            if (waits == 0) continue;
            if (waits != alive || alive != end - warp) {
                std::fprintf(stderr, "a shuffle that not all lanes of its warp come to\n");
                std::abort();
            }
            for (int i = warp; i < end; i++) fibers[i].state = State::Runs;
            released = true;
        }
        if (released) continue;
        int waits = 0, done = 0;
        for (int i = 0; i < count; i++) {
            waits += fibers[i].state == State::WaitsForBlock;
            done += fibers[i].state == State::Done;
        }
        if (waits == 0) return;
        if (done != 0) {
            std::fprintf(stderr, "a barrier that some threads never come to\n");
            std::abort();
        }
        for (int i = 0; i < count; i++) fibers[i].state = State::Runs;
    }
}

void run_grid(const std::function<void()>& kernel, Dim grid, Dim block) {
    gridDim = grid;
    blockDim = block;
    body = &kernel;
    int count = block.x * block.y * block.z;
    fibers.resize(std::max<size_t>(fibers.size(), count));
    for (auto& values : given) values.resize(std::max<size_t>(values.size(), count + WARP));
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = Dim{x, y, z};
                run_block(count);
            }
}
}  // namespace

void wait_for_block() { leave(State::WaitsForBlock); }

uint64_t exchange(uint64_t bits, int mask) {
    auto& values = given[fibers[current].turn++ % 2];
    values[current] = bits;
    int me = current;
    leave(State::WaitsForWarp);
    return values[me / WARP * WARP + ((me % WARP) ^ mask)];
}

// --------------------------------------------------------------------------------------------------- kernels
using Kernel = std::function<void(void** arguments, Dim grid, Dim block)>;

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

// Used by the files that `build` makes of the kernels' sources.
void add_kernel(const char* name, std::function<void(void**)> call) {
    kernels()[name] = [call](void** arguments, Dim grid, Dim block) {
        std::function<void()> one = [&] { call(arguments); };
        run_grid(one, grid, block);
    };
}

// candle's own kernels, as far as this project comes to them: what they compute, not how.
namespace {
struct bf16 {
    uint16_t bits;
    bf16() = default;
    bf16(double x) {
        float f = float(x);
        unsigned b = __float_as_uint(f);
        bits = std::isnan(f) ? 0x7fc0 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
    }
    operator double() const { return __uint_as_float(unsigned(bits) << 16); }
};

template <typename T>
T& get(void** arguments, int i) {
    return *static_cast<T*>(arguments[i]);
}

// Calls `with` on each element's number and its place by the strides number `which` of `info`.
size_t place(size_t i, size_t dims, const size_t* info, int which) {
    if (!info) return i;
    size_t at = 0;
    for (size_t d = dims; d-- > 0;) {
        at += i % info[d] * info[(which + 1) * dims + d];
        i /= info[d];
    }
    return at;
}

template <typename S, typename T, typename F>
void add_unary(const std::string& name, F f) {
    kernels()[name] = [f](void** a, Dim, Dim) {
        size_t count = get<size_t>(a, 0), dims = get<size_t>(a, 1);
        auto* info = get<const size_t*>(a, 2);
        auto* in = get<const S*>(a, 3);
        auto* out = get<T*>(a, 4);
        for (size_t i = 0; i < count; i++) out[i] = T(f(in ? double(in[place(i, dims, info, 0)]) : double(out[i])));
    };
}

template <typename T, typename F>
void add_binary(const std::string& name, F f) {
    kernels()[name] = [f](void** a, Dim, Dim) {
        size_t count = get<size_t>(a, 0), dims = get<size_t>(a, 1);
        auto* info = get<const size_t*>(a, 2);
        auto *left = get<const T*>(a, 3), *right = get<const T*>(a, 4);
        auto* out = get<T*>(a, 5);
        for (size_t i = 0; i < count; i++) {
            out[i] = T(f(double(left[place(i, dims, info, 0)]), double(right[place(i, dims, info, 1)])));
        }
    };
}

template <typename T>
void add_candle(const std::string& type) {
    auto same = [](double x) { return x; };
    add_unary<T, T>("ucopy_" + type, same);
    add_unary<T, T>("uabs_" + type, [](double x) { return std::fabs(x); });
    add_unary<T, T>("uneg_" + type, [](double x) { return -x; });
    add_unary<T, T>("uexp_" + type, [](double x) { return std::exp(x); });
    add_unary<T, T>("usqr_" + type, [](double x) { return x * x; });
    add_unary<T, T>("usqrt_" + type, [](double x) { return std::sqrt(x); });
    add_unary<T, T>("urelu_" + type, [](double x) { return x > 0 ? x : 0; });
    add_unary<T, T>("utanh_" + type, [](double x) { return std::tanh(x); });
    add_unary<T, T>("ufloor_" + type, [](double x) { return std::floor(x); });
    add_unary<T, float>("cast_" + type + "_f32", same);
    add_unary<T, double>("cast_" + type + "_f64", same);
    add_unary<T, bf16>("cast_" + type + "_bf16", same);
    add_unary<T, uint8_t>("cast_" + type + "_u8", same);
    add_binary<T>("badd_" + type, [](double x, double y) { return x + y; });
    add_binary<T>("bsub_" + type, [](double x, double y) { return x - y; });
    add_binary<T>("bmul_" + type, [](double x, double y) { return x * y; });
    add_binary<T>("bdiv_" + type, [](double x, double y) { return x / y; });
    kernels()["affine_" + type] = [](void** a, Dim, Dim) {
        size_t count = get<size_t>(a, 0), dims = get<size_t>(a, 1);
        auto* info = get<const size_t*>(a, 2);
        auto* in = get<const T*>(a, 3);
        auto* out = get<T*>(a, 4);
        double factor = get<T>(a, 5), plus = get<T>(a, 6);
        for (size_t i = 0; i < count; i++) {
            out[i] = T(double(T((in ? double(in[place(i, dims, info, 0)]) : double(out[i])) * factor)) + plus);
        }
    };
    kernels()["is_u32_" + type] = [](void** a, Dim, Dim) {
        auto* ids = get<const uint32_t*>(a, 3);
        auto* in = get<const T*>(a, 4);
        auto* out = get<T*>(a, 5);
        size_t left = get<size_t>(a, 6), source = get<size_t>(a, 7), count = get<size_t>(a, 8), right = get<size_t>(a, 9);
        for (size_t l = 0; l < left; l++)
            for (size_t i = 0; i < count; i++)
                std::copy_n(in + (l * source + ids[i]) * right, right, out + (l * count + i) * right);
    };
    kernels()["ia_u32_" + type] = [](void** a, Dim, Dim) {
        auto* ids = get<const uint32_t*>(a, 0);
        size_t count = get<size_t>(a, 1);
        auto* in = get<const T*>(a, 2);
        auto* out = get<T*>(a, 3);
        size_t left = get<size_t>(a, 4), source = get<size_t>(a, 5), target = get<size_t>(a, 6), right = get<size_t>(a, 7);
        for (size_t l = 0; l < left; l++)
            for (size_t i = 0; i < count; i++)
                for (size_t r = 0; r < right; r++) {
                    T& to = out[(l * target + ids[i]) * right + r];
                    to = T(double(to) + double(in[(l * source + i) * right + r]));
                }
    };
    kernels()["copy2d_" + type] = [](void** a, Dim, Dim) {
        auto* in = get<const T*>(a, 0);
        auto* out = get<T*>(a, 1);
        size_t rows = get<uint32_t>(a, 2), columns = get<uint32_t>(a, 3), from = get<uint32_t>(a, 4), to = get<uint32_t>(a, 5);
        for (size_t row = 0; row < rows; row++) std::copy_n(in + row * from, columns, out + row * to);
    };
    kernels()["const_set_" + type] = [](void** a, Dim, Dim) {
        size_t count = get<size_t>(a, 0), dims = get<size_t>(a, 1);
        auto* info = get<const size_t*>(a, 2);
        auto* out = get<T*>(a, 4);
        for (size_t i = 0; i < count; i++) out[place(i, dims, info, 0)] = get<T>(a, 3);
    };
    auto reduce = [](auto join) {
        return [join](void** a, Dim grid, Dim) {
            size_t of_each = get<size_t>(a, 1), dims = get<size_t>(a, 2), total = get<size_t>(a, 0);
            auto* info = get<const size_t*>(a, 3);
            auto* in = get<const T*>(a, 4);
            auto* out = get<T*>(a, 5);
            for (size_t block = 0; block < grid.x; block++) {
                double all = double(in[place(block * of_each, dims, info, 0)]);
                for (size_t i = block * of_each + 1; i < std::min((block + 1) * of_each, total); i++) {
                    all = join(all, double(in[place(i, dims, info, 0)]));
                }
                out[block] = T(all);
            }
        };
    };
    kernels()["fast_sum_" + type] = reduce([](double x, double y) { return x + y; });
    kernels()["fast_max_" + type] = reduce([](double x, double y) { return std::max(x, y); });
}

struct Candle {
    Candle() {
        add_candle<float>("f32");
        add_candle<double>("f64");
        add_candle<bf16>("bf16");
        add_candle<uint8_t>("u8");
        add_candle<uint32_t>("u32");
    }
} candle;
}  // namespace

// ---------------------------------------------------------------------------------------------------- driver
namespace {
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500 };
constexpr size_t PAGE = 4096;

struct Allocation {
    char* map;
    size_t length, bytes;
};
std::map<uint64_t, Allocation> allocations;
size_t used = 0, peak = 0;

size_t number(const char* variable, size_t otherwise) {
    const char* text = std::getenv(variable);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

size_t memory() { return number("CUDA_ON_CPU_BYTES", size_t(8) << 30); }

int allocate(uint64_t* pointer, size_t bytes) {
    if (bytes == 0) return INVALID_VALUE;
    if (used + bytes > memory()) return OUT_OF_MEMORY;
    // as a GPU does, at a multiple of 256; the rest of the last page is lost, and the page behind it cannot be touched
    size_t rounded = (bytes + 255) / 256 * 256, data = (rounded + PAGE - 1) / PAGE * PAGE;
    auto* map = static_cast<char*>(mmap(nullptr, data + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(map + data, PAGE, PROT_NONE);
    std::memset(map, 0xff, data);
    *pointer = reinterpret_cast<uint64_t>(map + data - rounded);
    allocations[*pointer] = Allocation{map, data + PAGE, bytes};
    used += bytes;
    peak = std::max(peak, used);
    return SUCCESS;
}

int release(uint64_t pointer) {
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    munmap(found->second.map, found->second.length);
    used -= found->second.bytes;
    allocations.erase(found);
    return SUCCESS;
}

int something;  // what handles point to
thread_local void* context = nullptr;
}  // namespace

extern "C" {
int cuInit(unsigned) { return number("CUDA_ON_CPU_INIT", SUCCESS); }
int cuDriverGetVersion(int* version) { return *version = number("CUDA_ON_CPU_VERSION", 13000), SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, length, "this CPU, emulating"), SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    size_t capability = number("CUDA_ON_CPU_CAPABILITY", 80);
    switch (attribute) {
        case 75: *value = capability / 10; break;  // compute capability
        case 76: *value = capability % 10; break;
        case 115: *value = 1; break;  // memory pools
        default: *value = 0;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &something, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxGetCurrent(void** out) { return *out = context, SUCCESS; }
int cuCtxSetCurrent(void* to) { return context = to, SUCCESS; }
int cuCtxSynchronize() { return SUCCESS; }
int cuStreamCreate(void** out, unsigned) { return *out = &something, SUCCESS; }
int cuStreamDestroy_v2(void*) { return SUCCESS; }
int cuStreamSynchronize(void*) { return SUCCESS; }
int cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, SUCCESS; }
int cuEventCreate(void** out, unsigned) { return *out = &something, SUCCESS; }
int cuEventRecord(void*, void*) { return SUCCESS; }
int cuEventDestroy_v2(void*) { return SUCCESS; }
int cuMemAllocAsync(uint64_t* pointer, size_t bytes, void*) { return allocate(pointer, bytes); }
int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) { return allocate(pointer, bytes); }
int cuMemFreeAsync(uint64_t pointer, void*) { return release(pointer); }
int cuMemFree_v2(uint64_t pointer) { return release(pointer); }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void*) {
    return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) {
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) {
    return std::memcpy(to, reinterpret_cast<void*>(from), bytes), SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
    return std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), SUCCESS;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *total = memory(), *free = *total - used, SUCCESS; }
int cuDeviceGetDefaultMemPool(void** out, int) { return *out = &something, SUCCESS; }
int cuMemPoolGetAttribute(void*, int, uint64_t* value) { return *value = peak, SUCCESS; }
int cuMemPoolSetAttribute(void*, int attribute, uint64_t*) {
    if (attribute == 8) peak = used;  // USED_MEM_HIGH
    return SUCCESS;
}
int cuModuleLoadData(void** out, const void*) { return *out = &something, SUCCESS; }
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** out, void*, const char* name) {
    auto found = kernels().find(name);
    if (found == kernels().end()) {
        std::fprintf(stderr, "no kernel `%s` on this CPU\n", name);
        return NOT_FOUND;
    }
    return *out = &found->second, SUCCESS;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void*, void** arguments, void**) {
    if (bx * by * bz > 1024 || gy > 65535 || gz > 65535) return INVALID_VALUE;
    (*static_cast<Kernel*>(function))(arguments, Dim{gx, gy, gz}, Dim{bx, by, bz});
    return SUCCESS;
}
int cuGetErrorName(int error, const char** out) {
    switch (error) {
        case INVALID_VALUE: *out = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *out = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *out = "CUDA_ERROR_NO_DEVICE"; break;
        case NOT_FOUND: *out = "CUDA_ERROR_NOT_FOUND"; break;
        default: *out = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
int cuGetErrorString(int, const char** out) { return *out = "from the CPU that emulates a GPU", SUCCESS; }

// ---------------------------------------------------------------------------------------------------- cuBLAS
int cublasCreate_v2(void** out) { return *out = &something, 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
}

namespace {
enum { R_32F = 0, R_16BF = 14 };

size_t size_of(int type) { return type == R_16BF ? 2 : 4; }

float read(const char* at, int type) {
    if (type == R_16BF) {
        uint16_t bits;
        std::memcpy(&bits, at, 2);
        return __uint_as_float(unsigned(bits) << 16);
    }
    float value;
    std::memcpy(&value, at, 4);
    return value;
}

// `rows` of `inner` neighbours each, of a matrix stored by columns, `turned` or not
std::vector<float> rows_of(const char* from, int type, long long stride, bool turned, int rows, int inner) {
    std::vector<float> out(size_t(rows) * inner);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < inner; k++) {
            long long at = turned ? k + r * stride : r + k * stride;
            out[size_t(r) * inner + k] = read(from + at * size_of(type), type);
        }
    return out;
}
}  // namespace

extern "C" int cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const float* alpha, const char* a,
                                          int type_a, int lda, long long step_a, const char* b, int type_b, int ldb,
                                          long long step_b, const float* beta, char* c, int type_c, int ldc,
                                          long long step_c, int count, int, int) {
    for (int i = 0; i < count; i++) {
        auto left = rows_of(a + i * step_a * size_of(type_a), type_a, lda, ta == 1, m, k);
        auto right = rows_of(b + i * step_b * size_of(type_b), type_b, ldb, tb == 0, n, k);
        for (int column = 0; column < n; column++)
            for (int row = 0; row < m; row++) {
                const float *x = &left[size_t(row) * k], *y = &right[size_t(column) * k];
                float sum = 0;
#pragma GCC ivdep
                for (int j = 0; j < k; j++) sum += x[j] * y[j];
                char* to = c + (i * step_c + row + (long long)column * ldc) * size_of(type_c);
                float value = *alpha * sum + (*beta == 0.0f ? 0.0f : *beta * read(to, type_c));
                if (type_c == R_16BF) {
                    bf16 narrow(value);
                    std::memcpy(to, &narrow, 2);
                } else {
                    std::memcpy(to, &value, 4);
                }
            }
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------- cuRAND
static std::mt19937 random_bits(1);
extern "C" {
int curandCreateGenerator(void** out, int) { return *out = &something, 0; }
int curandDestroyGenerator(void*) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long seed) { return random_bits.seed(seed), 0; }
int curandSetStream(void*, void*) { return 0; }
int curandGenerateUniform(void*, float* out, size_t count) {
    std::uniform_real_distribution<float> uniform(0, 1);
    for (size_t i = 0; i < count; i++) out[i] = uniform(random_bits);
    return 0;
}
int curandGenerateNormal(void*, float* out, size_t count, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    for (size_t i = 0; i < count; i++) out[i] = normal(random_bits);
    return 0;
}
}
