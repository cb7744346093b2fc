// The kernels' ground where there is no GPU: CUDA's words in C++, for tests of the very sources that ship. A thread is a
// fiber with a stack of its own; what a warp or a block does together happens when all of them have come. A kernel that
// may start early is started as early as it may: up to its wait, before the one ahead of it runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <sys/mman.h>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
using std::max;
using std::min;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __shared__ static thread_local
#define __align__(n) alignas(n)
#define INLINE inline
#define DEV [[maybe_unused]] static inline

// ---- Fibers

#if !defined(__x86_64__)
#error "kernels are emulated on x86-64"
#endif
extern "C" void weir_switch(void **save, void *load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden weir_switch
.globl weir_switch
weir_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

struct Warp {
    int arrived = 0;
    u32 generation = 0;
    u32 in[32][10], out[32][4];
};
struct ThreadBlock;
struct Fiber {
    void *stack_pointer;
    ThreadBlock *block;
    Index thread;
    int lane;
    Warp *warp;
    bool done = false, waits = false;
};
typedef void (*Body)(const void *);
static constexpr size_t STACK = 64 << 10;
struct ThreadBlock {
    Index index, grid, size;
    Body body;
    const void *args;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<u8> shared;
    u8 *stacks;
    void *scheduler;
    int alive, arrived = 0;
    u32 generation = 0;
    u64 progress = 0;
};
static thread_local Fiber *current;
static thread_local u8 *dynamic_shared;
#define threadIdx (current->thread)
#define blockIdx (current->block->index)
#define gridDim (current->block->grid)
#define blockDim (current->block->size)

static void yield() {
    Fiber *self = current;
    weir_switch(&self->stack_pointer, self->block->scheduler);
    current = self;
    dynamic_shared = self->block->shared.data();
}
static void enter_fiber() {
    Fiber *self = current;
    self->block->body(self->block->args);
    self->done = true;
    self->block->alive--;
    self->block->progress++;
    yield();
    abort();
}
static ThreadBlock *make_block(Index index, Index grid, int threads, size_t shared, Body body, const void *args) {
    ThreadBlock *b = new ThreadBlock;
    b->index = index; b->grid = grid; b->size = {threads, 1, 1};
    b->body = body; b->args = args; b->alive = threads;
    b->warps.resize(threads / 32);
    // shared memory has no defined contents
    b->shared.assign(shared + 64, 0xff);
    b->stacks = (u8 *)mmap(0, STACK * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b->stacks == MAP_FAILED) { fprintf(stderr, "no memory for %d threads\n", threads); abort(); }
    b->fibers.resize(threads);
    for (int i = 0; i < threads; i++) {
        Fiber &f = b->fibers[i];
        f.block = b; f.thread = {i, 0, 0}; f.lane = i & 31; f.warp = &b->warps[i >> 5];
        void **top = (void **)(b->stacks + STACK * (i + 1)) - 2;
        *top = (void *)enter_fiber;
        f.stack_pointer = top - 6;
    }
    return b;
}
// Runs until all threads are done, or, if `to_wait`, until all are done or wait for the kernel ahead.
static void run_block(ThreadBlock *b, bool to_wait) {
    for (;;) {
        const u64 before = b->progress;
        bool left = false;
        for (Fiber &f : b->fibers) {
            if (f.done || (to_wait && f.waits)) continue;
            left = true;
            current = &f;
            dynamic_shared = b->shared.data();
            weir_switch(&b->scheduler, f.stack_pointer);
        }
        if (!left) return;
        if (b->progress == before) {
            fprintf(stderr, "threads of a block wait for each other for ever\n");
            abort();
        }
    }
}
static void free_block(ThreadBlock *b) {
    munmap(b->stacks, STACK * b->fibers.size());
    delete b;
}
static thread_local bool early;
static void wait_previous(u64 *) {
    if (current->waits || !early) return;
    current->waits = true;
    current->block->progress++;
    yield();
}
static void launch_next() {}
static void trace(u64 *, int) {}

// ---- What a warp does together: the last to come does it for all.

template <class Do> static void together(Do work) {
    Warp &w = *current->warp;
    const u32 generation = w.generation;
    current->block->progress++;
    if (++w.arrived == 32) {
        work(w);
        w.arrived = 0;
        w.generation++;
        return;
    }
    while (w.generation == generation) yield();
}
static void __syncwarp() { together([](Warp &) {}); }
static void __syncthreads() {
    ThreadBlock *b = current->block;
    const u32 generation = b->generation;
    b->progress++;
    b->arrived++;
    for (;;) {
        if (b->generation != generation) return;
        // threads that have ended don't count
        if (b->arrived == b->alive) { b->arrived = 0; b->generation++; b->progress++; return; }
        yield();
    }
}
static u32 __float_as_uint(float f) { u32 u; memcpy(&u, &f, 4); return u; }
static int __float_as_int(float f) { return (int)__float_as_uint(f); }
static float __uint_as_float(u32 u) { float f; memcpy(&f, &u, 4); return f; }
static float __int_as_float(int i) { return __uint_as_float((u32)i); }

static u32 exchange(u32 v, int from) {
    current->warp->in[current->lane][0] = v;
    together([](Warp &w) { for (int i = 0; i < 32; i++) w.out[i][0] = w.in[i][0]; });
    return current->warp->out[from][0];
}
static float __shfl_xor_sync(u32, float v, int mask) { return __uint_as_float(exchange(__float_as_uint(v), current->lane ^ mask)); }
static int __shfl_xor_sync(u32, int v, int mask) { return (int)exchange((u32)v, current->lane ^ mask); }
static u32 __reduce_max_sync(u32, u32 v) {
    current->warp->in[current->lane][0] = v;
    together([](Warp &w) {
        u32 most = 0;
        for (int i = 0; i < 32; i++) most = max(most, w.in[i][0]);
        for (int i = 0; i < 32; i++) w.out[i][0] = most;
    });
    return current->warp->out[current->lane][0];
}
static int __reduce_add_sync(u32, int v) {
    current->warp->in[current->lane][0] = (u32)v;
    together([](Warp &w) {
        u32 sum = 0;
        for (int i = 0; i < 32; i++) sum += w.in[i][0];
        for (int i = 0; i < 32; i++) w.out[i][0] = sum;
    });
    return (int)current->warp->out[current->lane][0];
}

static float half_to_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
static u16 float_to_half(float v) { _Float16 f = (_Float16)v; u16 h; memcpy(&h, &f, 2); return h; }
static u16 float_to_bf16(float v) {
    const u32 u = __float_as_uint(v);
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static u32 floats_to_bf16(float low, float high) { return float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }
static u32 __byte_perm(u32 a, u32 b, u32 select) {
    const u64 both = (u64)b << 32 | a;
    u32 v = 0;
    for (int i = 0; i < 4; i++) v |= (u32)(both >> (8 * (select >> (4 * i) & 7)) & 255) << (8 * i);
    return v;
}
struct Barrier { u8 left, count; u32 phase; };
static void barrier_begin(u64 *b, int count) { *(Barrier *)b = {(u8)count, (u8)count, 0}; }
static void barrier_arrive(u64 *at) {
    Barrier *b = (Barrier *)at;
    current->block->progress++;
    if (--b->left == 0) { b->left = b->count; b->phase++; }
}
static void barrier_wait(u64 *b, u32 parity) { while ((((Barrier *)b)->phase & 1) == parity) yield(); }
static void barriers_begun() {}
#define FETCHERS 1
static void fetch_stage(u64 *full, u8 *to, const u8 *from, int bytes) {
    if (current->lane != 0) return;
    memcpy(to, from, bytes);
    barrier_arrive(full);
}
static u32 shared_address(const u8 *p) { return (u32)(u64)p; }
#define PAIRS_BY_WARPS

// Operands as lanes (g, t) hold them; DEPTH values a row of A and a column of B.
template <int DEPTH, class A, class B, class C> static void multiply_tiles(Warp &w, A a_of, B b_of, C step) {
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            const int lane = (row & 7) * 4 + column / 2, place = (row >> 3) * 2 + (column & 1);
            w.out[lane][place] = step(w.in[lane][6 + place], [&](auto sum) {
                for (int k = 0; k < DEPTH; k++) sum += a_of(w, row, k) * b_of(w, k, column);
                return sum;
            });
        }
}
static void put_operands(const u32 *a, int na, u32 b0, u32 b1, const u32 *c) {
    u32 *in = current->warp->in[current->lane];
    for (int i = 0; i < na; i++) in[i] = a[i];
    in[4] = b0;
    in[5] = b1;
    for (int i = 0; i < 4; i++) in[6 + i] = c[i];
}
static i8 byte_of(u32 w, int j) { return (i8)(w >> (8 * j)); }
static void mma_s8(int c[4], const u32 a[4], u32 b0, u32 b1, int start) {
    for (int i = 0; i < 4; i++) c[i] = start;
    put_operands(a, 4, b0, b1, (u32 *)c);
    together([](Warp &w) {
        multiply_tiles<32>(
            w, [](Warp &w, int r, int k) { return (int)byte_of(w.in[(r & 7) * 4 + k % 16 / 4][k / 16 * 2 + (r >> 3)], k & 3); },
            [](Warp &w, int k, int n) { return (int)byte_of(w.in[n * 4 + k % 16 / 4][4 + k / 16], k & 3); },
            [](u32 c, auto add) { return (u32)add((int)c); });
    });
    memcpy(c, current->warp->out[current->lane], 16);
}
static void mma_s8_16(int c[4], u32 a0, u32 a1, u32 b, int start) {
    for (int i = 0; i < 4; i++) c[i] = start;
    const u32 a[2] = {a0, a1};
    put_operands(a, 2, b, 0, (u32 *)c);
    together([](Warp &w) {
        multiply_tiles<16>(
            w, [](Warp &w, int r, int k) { return (int)byte_of(w.in[(r & 7) * 4 + k / 4][r >> 3], k & 3); },
            [](Warp &w, int k, int n) { return (int)byte_of(w.in[n * 4 + k / 4][4], k & 3); },
            [](u32 c, auto add) { return (u32)add((int)c); });
    });
    memcpy(c, current->warp->out[current->lane], 16);
}
template <class Value> static void mma_halves(float c[4], const u32 a[4], u32 b0, u32 b1, Value) {
    put_operands(a, 4, b0, b1, (u32 *)c);
    together([](Warp &w) {
        multiply_tiles<16>(
            w,
            [](Warp &w, int r, int k) { return Value()((u16)(w.in[(r & 7) * 4 + k % 8 / 2][k / 8 * 2 + (r >> 3)] >> (16 * (k & 1)))); },
            [](Warp &w, int k, int n) { return Value()((u16)(w.in[n * 4 + k % 8 / 2][4 + k / 8] >> (16 * (k & 1)))); },
            [](u32 c, auto add) { return __float_as_uint(add(__uint_as_float(c))); });
    });
    memcpy(c, current->warp->out[current->lane], 16);
}
struct OfHalf { float operator()(u16 h) const { return half_to_float(h); } };
struct OfBf16 { float operator()(u16 h) const { return __uint_as_float((u32)h << 16); } };
static void mma_f16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    mma_halves(c, a, b0, b1, OfHalf());
}
static void mma_bf16(float c[4], uint4 v, u32 b0, u32 b1) {
    const u32 a[4] = {v.x, v.y, v.z, v.w};
    mma_halves(c, a, b0, b1, OfBf16());
}

// ---- The rest is arithmetic and memory.

static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static float __frsqrt_rn(float a) { return (float)(1.0 / sqrt((double)a)); }
static int __float2int_rn(float a) { return std::isnan(a) ? 0 : (int)std::clamp(rint((double)a), -2147483648.0, 2147483647.0); }
static u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
static float exp_(float x) { return exp2f(x * 1.4426950408889634f); }
static uint4 stream4(const uint4 *p) { return *p; }
static uint2 stream2(const uint2 *p) { return *p; }
static u32 stream1(const u32 *p) { return *p; }
template <class T> static T __ldcg(const T *p) { return *p; }
template <class T> static void __stcg(T *p, T v) { *p = v; }
// launches of several streams run on several threads
static u32 atomicAdd(u32 *p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static u64 atomicAdd(u64 *p, u64 v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static u32 atomicOr(u32 *p, u32 v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
static void __threadfence() {}
static void __threadfence_system() {}
static void copy_async(u8 *to, const void *from) { memcpy(to, from, 16); }
static void copy_async8(u8 *to, const void *from) { memcpy(to, from, 8); }
static void copies_end() {}
template <int N> static void copies_wait() {}

// ---- Launches

struct Launch {
    std::vector<ThreadBlock *> blocks;
    std::vector<u8> args;
    Body body;
    Index grid;
    int threads;
    size_t shared;
    bool parked;
};
static void *begin_launch(const int *grid, int threads, size_t shared, const void *args, size_t bytes, bool starts_early, Body body) {
    Launch *l = new Launch;
    l->args.assign((const u8 *)args, (const u8 *)args + bytes);
    l->body = body;
    l->grid = {grid[0], grid[1], grid[2]};
    l->threads = threads;
    l->shared = shared;
    l->parked = starts_early && (long)grid[0] * grid[1] * grid[2] * threads <= 20000;
    if (!l->parked) return l;
    early = true;
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                l->blocks.push_back(make_block({x, y, z}, l->grid, threads, shared, body, l->args.data()));
                run_block(l->blocks.back(), true);
            }
    return l;
}
static void end_launch(void *launch) {
    Launch *l = (Launch *)launch;
    early = l->parked;
    for (ThreadBlock *b : l->blocks) { run_block(b, false); free_block(b); }
    if (!l->parked)
        for (int z = 0; z < l->grid.z; z++)
            for (int y = 0; y < l->grid.y; y++)
                for (int x = 0; x < l->grid.x; x++) {
                    ThreadBlock *b = make_block({x, y, z}, l->grid, l->threads, l->shared, l->body, l->args.data());
                    run_block(b, false);
                    free_block(b);
                }
    delete l;
}

#define KERNEL(name, threads, blocks, Args, ...)                                                                       \
    static void name##_body(const void *at) { const Args &p = *(const Args *)at; __VA_ARGS__ }                         \
    extern "C" void *name##_begin(const int *grid, int count, size_t shared, const void *args, size_t bytes, bool early) { \
        if (bytes != sizeof(Args)) { fprintf(stderr, #name " takes %zu bytes, not %zu\n", sizeof(Args), bytes); abort(); } \
        return begin_launch(grid, count, shared, args, bytes, early, name##_body);                                     \
    }                                                                                                                  \
    extern "C" void name##_end(void *launch) { end_launch(launch); }
