// What only NVIDIA's compiler understands; `emulate.cpp` has the same for a processor.
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__
#define DEV static INLINE
// A kernel of so many threads a block, and at least so many blocks a multiprocessor.
#define KERNEL(name, threads, blocks, Args, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args p) { __VA_ARGS__ }

extern __shared__ __align__(16) u8 dynamic_shared[];

// When a launch began, was let go, and ended: the least, the latest, the latest over its thread blocks, in nanoseconds.
// Compiled in only for profiles.
DEV void trace(u64 *at, int point) {
#ifdef TRACE
    if (threadIdx.x == 0) {
        u64 now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (point == 0) atomicMin(at, now);
        else atomicMax(at + point, now);
    }
#endif
}

// Programmatic dependent launch: the next kernel may start; everything before this one is done and visible.
DEV void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEV void wait_previous(u64 *at) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    trace(at, 1);
}

DEV float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEV u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEV u16 float_to_bf16(float f) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }

// exp, 0 for -inf; the same instructions wherever it is used.
DEV float exp_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(x, 1.4426950408889634f))); return y; }

// Weights are read once: around the first-level cache. Not as constants (`.nc`): the assembler moves a wait for the kernel ahead
// before loads of those, which were to be on their way by then.
DEV uint4 stream4(const uint4 *p) { uint4 v; asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
DEV uint2 stream2(const uint2 *p) { uint2 v; asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); return v; }
DEV u32 stream1(const u32 *p) { u32 v; asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }

// 16 x 8 outputs, 32 (or 16) deep, of signed bytes, each added to `start`.
DEV void mma_s8(int c[4], const u32 a[4], u32 b0, u32 b1, int start) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}
DEV void mma_s8_16(int c[4], u32 a0, u32 a1, u32 b, int start) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(start));
}
// The same of halves; C in, C out.
DEV void mma_f16(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma_bf16(float c[4], uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Two floats as bf16, the first in the lower half.
DEV u32 floats_to_bf16(float low, float high) { u32 v; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low)); return v; }

// Copies of 16 and 8 bytes into shared memory, in groups.
DEV void copy_async(u8 *to, const void *from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)); }
DEV void copy_async8(u8 *to, const void *from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)); }
DEV void copies_end() { asm volatile("cp.async.commit_group;"); }
template <int N> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

DEV u32 shared_address(const u8 *p) { return (u32)__cvta_generic_to_shared(p); }

// A pair by the columns in a stage (`prompt.cu`), added to `c`: begun. `multiplied<N>`: all but the last N pairs are done.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Operand B in shared memory: rows of 128 bytes, eighths exchanged, eight rows 1,024 bytes.
DEV void warpgroup_mma(float (&c)[4][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
DEV void warpgroup_mma(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
                 : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
template <int NT> DEV void multiply_pair(float (&c)[NT][4], const u32 (&a)[4][4], const u8 *stage) {
    const u64 b = (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (shared_address(stage) & 0x3ffff) >> 4;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; s++) warpgroup_mma(c, a[s], b + 2 * s);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> DEV void multiplied() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
#else
#define PAIRS_BY_WARPS
#endif

// Barriers in shared memory: each phase ends when so many have arrived, and what they fetch is there.
DEV void barrier_begin(u64 *b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address((u8 *)b)), "r"(count) : "memory"); }
DEV void barrier_arrive(u64 *b) { asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address((u8 *)b)) : "memory"); }
// Until the phase of that parity has ended.
DEV void barrier_wait(u64 *b, u32 parity) {
    u32 over = 0;
    while (!over)
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(over) : "r"(shared_address((u8 *)b)), "r"(parity) : "memory");
}
// A warp fetches `bytes`, and `full` hears of it.
#if __CUDA_ARCH__ >= 900
#define FETCHERS 1
// Makes barriers known to what copies.
DEV void barriers_begun() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void fetch_stage(u64 *full, u8 *to, const u8 *from, int bytes) {
    if ((threadIdx.x & 31) != 0) return;
    const u32 b = shared_address((u8 *)full);
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(b), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(b) : "memory");
}
#else
#define FETCHERS 32
DEV void barriers_begun() {}
DEV void fetch_stage(u64 *full, u8 *to, const u8 *from, int bytes) {
    for (int i = (threadIdx.x & 31) * 16; i < bytes; i += 512) copy_async(to + i, from + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address((u8 *)full)) : "memory");
}
#endif
