// Products of many columns: bound by arithmetic. A thread block takes eight tile rows and 128 columns, a warp two of the
// tile rows and 32 of the columns; tiles and inputs come through stages of shared memory that all share. Segments follow
// each other, or are thread blocks' of their own where there would be few, and their sums are added in the same order.
// WIDE_ROOM: bytes of shared memory for the stages.
#define WIDE 128
#define TILES 8
#define WARPS 16

template <int F> struct Stage {
    using T = Format<F>;
    // of one pair: bytes of a column, of its scales, of its totals or sums
    static constexpr int Q = T::HALF ? 128 : 64, D = T::HALF && F != F_F16 ? 0 : 8, SUM = T::K32 || T::MIN ? 8 : 0;
    static constexpr int TILE = Piece<F>::BYTES;
    static constexpr int AT_Q = TILES * TILE, AT_D = AT_Q + WIDE * Q, AT_SUM = AT_D + WIDE * D, BYTES = AT_SUM + WIDE * SUM;
    // packed tiles are unpacked by all warps together, into one of two places: operands, scales, minima
    static constexpr bool UNPACK = T::Q == 1;
    static constexpr int D_AT = 1024, M_AT = 1152, UNPACKED = UNPACK ? TILES * 1280 : 0;
    static constexpr int ROOM = WIDE_ROOM - 2 * UNPACKED - (WIDE_ROOM >= 150000 ? WARPS * 32 * 128 : 0);
    static constexpr int COUNT = ROOM / BYTES < 1 ? 1 : ROOM / BYTES > 4 ? 4 : ROOM / BYTES;
    static_assert(COUNT > 2 || !UNPACK, "the pair after the next is asked for while two are there");
};

// Unpacks a pair of all tiles: each warp one block of one.
template <int F> DEV void unpack(const u8 *stage, u8 *to) {
    using S = Stage<F>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, b = warp & 1;
    Tile<F> tile;
    tile.read(stage + (warp >> 1) * S::TILE);
    Ready<F> ready;
    if (b) ready.block(tile, 1);
    else ready.block(tile, 0);
    u8 *at = to + (warp >> 1) * 1280;
    *(uint4 *)(at + (b * 32 + lane) * 16) = b ? make_uint4(ready.a[1][0], ready.a[1][1], ready.a[1][2], ready.a[1][3]) : make_uint4(ready.a[0][0], ready.a[0][1], ready.a[0][2], ready.a[0][3]);
    if ((lane & 3) == 0) *(float2 *)(at + S::D_AT + (b * 8 + (lane >> 2)) * 8) = b ? make_float2(ready.d[1][0], ready.d[1][1]) : make_float2(ready.d[0][0], ready.d[0][1]);
    if ((lane & 3) == 1) *(float2 *)(at + S::M_AT + (b * 8 + (lane >> 2)) * 8) = b ? make_float2(ready.m[1][0], ready.m[1][1]) : make_float2(ready.m[0][0], ready.m[0][1]);
}

template <int F> DEV Ready<F> unpacked(const u8 *at) {
    using T = Format<F>;
    using S = Stage<F>;
    const int lane = threadIdx.x & 31, g = lane >> 2;
    Ready<F> ready;
#pragma unroll
    for (int b = 0; b < 2; b++) {
        const uint4 a = *(const uint4 *)(at + (b * 32 + lane) * 16);
        ready.a[b][0] = a.x; ready.a[b][1] = a.y; ready.a[b][2] = a.z; ready.a[b][3] = a.w;
        const float2 d = *(const float2 *)(at + S::D_AT + (b * 8 + g) * 8);
        ready.d[b][0] = d.x; ready.d[b][1] = d.y;
        if (T::MIN || T::K16) {
            const float2 m = *(const float2 *)(at + S::M_AT + (b * 8 + g) * 8);
            ready.m[b][0] = m.x; ready.m[b][1] = m.y;
        }
    }
    return ready;
}

// What a thread copies of every pair: its lane's part of one tile, and of the columns' inputs.
template <class G, int F> struct Fetch {
    using T = Format<F>;
    using S = Stage<F>;
    static constexpr int PARTS = S::Q / 16, EACH = WIDE * PARTS / (WARPS * 32);
    const GemmArgs &p;
    const Matrix m;
    int tile;
    u32 column[EACH], scales; // offsets of rows, in pairs

    INLINE Fetch(const GemmArgs &p, const Matrix &m, int unit) : p(p), m(m), tile(unit * TILES + (threadIdx.x >> 5)) {
        const int column0 = blockIdx.x * WIDE;
        auto row_of = [&](int c) { return (u32)(G::MAP ? p.map[min(column0 + c, p.columns - 1)] : column0 + c) * G::PAIRS; };
#pragma unroll
        for (int k = 0; k < EACH; k++) column[k] = row_of((k * WARPS * 32 + threadIdx.x) / PARTS);
        scales = row_of(threadIdx.x % WIDE);
    }
    INLINE void ask(int pair, u8 *to) const {
        if (threadIdx.x < TILES * 32) Piece<F>::copy(to + (threadIdx.x >> 5) * S::TILE, m, tile, G::PAIRS, pair);
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = k * WARPS * 32 + threadIdx.x, c = i / PARTS, part = i % PARTS;
            // halves: a lane's second sixteen bytes lie apart, in other banks than the neighbour column's
            const int place = S::Q == 64 ? part * 16 : ((part ^ c) & 1) * 64 + (part >> 1) * 16;
            copy_async(to + S::AT_Q + c * S::Q + place, (S::Q == 128 ? (const u8 *)p.in.h : p.in.q) + (column[k] + pair) * S::Q + part * 16);
        }
        // the other warps
        const int c = threadIdx.x % WIDE;
        if (S::D && threadIdx.x >> 7 == 2) copy_async8(to + S::AT_D + c * 8, (S::Q == 128 ? p.in.hd : p.in.d) + (scales + pair) * 2);
        if (S::SUM && threadIdx.x >> 7 == 3) copy_async8(to + S::AT_SUM + c * 8, T::K32 ? (const void *)(p.in.sums + scales + pair) : p.in.totals + (scales + pair) * 2);
    }
};

// The sums of segments so far: in shared memory where there is much of it, since registers decide how many products are
// under way.
struct Sums {
    static constexpr bool SHARED = WIDE_ROOM >= 150000;
    float in_registers[SHARED ? 1 : 32];

    INLINE float *at(int i) { return SHARED ? (float *)(dynamic_shared + WIDE_ROOM - WARPS * 32 * 128) + i * (WARPS * 32) + threadIdx.x : in_registers + i; }
    INLINE void add(float (&acc)[2][4][4], bool first) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float &v = acc[i >> 4][i >> 2 & 3][i & 3];
            *at(i) = first ? v : __fadd_rn(*at(i), v);
            v = 0;
        }
    }
};

// Pairs from .. to of a tile's columns; `sums`: the segments' so far, in order.
template <class G, int F>
DEV void accumulate_wide(const GemmArgs &p, const Matrix &m, int unit, int from, int to, float *roots, float (&sums)[2][4][4]) {
    using T = Format<F>;
    using S = Stage<F>;
    u8 *room = dynamic_shared;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, wm = warp & 3, wn = warp >> 2;
    const bool busy = (int)blockIdx.x * WIDE + wn * 32 < p.columns;
    const Fetch<G, F> fetch(p, m, unit);
#pragma unroll 1
    for (int i = 0; i < S::COUNT - 1; i++) {
        if (from + i < to) fetch.ask(from + i, room + i * S::BYTES);
        copies_end();
    }
    if (G::NORM) {
        const int column0 = blockIdx.x * WIDE;
#pragma unroll 4
        for (int k = 0; k < WIDE / WARPS; k++) {
            Squares<G> squares;
            squares.load(p, min(column0 + k * WARPS + warp, p.columns - 1));
            const float root = squares.root();
            if (lane == 0) roots[k * WARPS + warp] = root;
        }
    }
    Sums so_far;
    float acc[2][4][4];
#pragma unroll
    for (int i = 0; i < 32; i++) acc[i >> 4][i >> 2 & 3][i & 3] = 0;
    Columns<4> x;
    x.hi = g & 1 ? -64 : 64;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        x.q_at[n] = n * 8 * S::Q;
#pragma unroll
        for (int i = 0; i < 2; i++) x.d_at[n][i] = (n * 8 + i) * 2;
    }
    Minima minima[2];
    // of column g of each eight: sums of the blocks of the pair whose number among four is t
    uint2 block_sums[4] = {};
    u8 *ready_at = room + S::COUNT * S::BYTES;
    if (S::UNPACK) {
        copies_wait<(S::COUNT > 1 ? S::COUNT - 2 : 0)>();
        __syncthreads();
        unpack<F>(room, ready_at);
    }
    int stage = 0, pair = from;
#pragma unroll 1
    for (int end = min(from + G::SEG, to); pair < to; end = min(end + G::SEG, to)) {
        const bool first = pair == from;
#pragma unroll 1
        for (; pair < end; pair++) {
            if (S::COUNT > 1) {
                // this pair is there; the next one too, if it must be unpacked
                copies_wait<(S::COUNT > 1 ? S::COUNT - 2 - S::UNPACK : 0)>();
                __syncthreads();
                const int ahead = stage == 0 ? S::COUNT - 1 : stage - 1;
                if (pair + S::COUNT - 1 < to) fetch.ask(pair + S::COUNT - 1, room + ahead * S::BYTES);
            } else {
                __syncthreads();
                fetch.ask(pair, room);
            }
            copies_end();
            if (S::COUNT == 1) {
                copies_wait<0>();
                __syncthreads();
            }
            const u8 *at = room + stage * S::BYTES;
            stage = stage + 1 == S::COUNT ? 0 : stage + 1;
            const u8 *ready = ready_at + ((pair - from) & 1) * S::UNPACKED;
            if (S::UNPACK && pair + 1 < to) unpack<F>(room + stage * S::BYTES, ready_at + ((pair - from + 1) & 1) * S::UNPACKED);
            if (!busy) continue;
            x.q = at + S::AT_Q + (wn * 32 + g) * S::Q + (T::HALF ? (g & 1) * 64 + t * 16 : t * 16);
            x.d = (const float *)(at + S::AT_D) + (wn * 32 + 2 * t) * 2;
            x.totals = (const float *)(at + S::AT_SUM) + (wn * 32 + 2 * t) * 2;
            if constexpr (T::HALF) {
                Tile<F> tile[2];
#pragma unroll
                for (int r = 0; r < 2; r++) tile[r].read(at + (wm * 2 + r) * S::TILE);
                multiply_halves<F, 2, 4, false, true>(tile, x, 0, acc);
            } else {
                Ready<F> tile[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if constexpr (S::UNPACK) tile[r] = unpacked<F>(ready + (wm * 2 + r) * 1280);
                    else {
                        Tile<F> packed;
                        packed.read(at + (wm * 2 + r) * S::TILE);
                        tile[r].block(packed, 0);
                        tile[r].block(packed, 1);
                    }
                }
                multiply_bytes<F, 2, 4, false, true>(tile, x, 0, acc);
            }
            if (T::K32) {
                using P = Piece<F>;
                if ((pair & 3) == t)
#pragma unroll
                    for (int n = 0; n < 4; n++) block_sums[n] = ((const uint2 *)(at + S::AT_SUM))[wn * 32 + n * 8 + g];
#pragma unroll
                for (int r = 0; r < 2; r++) minima[r].keep(((const uint2 *)(at + (wm * 2 + r) * S::TILE + P::S))[g], pair);
                if (Minima::due(pair, end))
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const uint2 both = ((const uint2 *)(at + (wm * 2 + r) * S::TILE + P::SUPER))[g];
                        const u32 super[2] = {both.x, both.y};
                        minima[r].template subtract<4, false>(super, block_sums, acc[r]);
                    }
            }
        }
        so_far.add(acc, first);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) sums[i >> 4][i >> 2 & 3][i & 3] = *so_far.at(i);
    __syncthreads();
}

// Adds the segments of thread blocks of their own; true for the last of them, which has all.
template <class G> DEV bool join_segments(const GemmArgs &p, float (&sums)[2][4][4]) {
    __shared__ bool final;
    const int tile = blockIdx.y * gridDim.x + blockIdx.x;
    auto part = [&](int segment, int i) { return p.partial + (((long long)tile * G::SEGS + segment) * 32 + i) * (WARPS * 32) + threadIdx.x; };
#pragma unroll
    for (int i = 0; i < 32; i++) __stcg(part(blockIdx.z, i), sums[i >> 4][i >> 2 & 3][i & 3]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        final = atomicAdd(p.arrived + tile, 1) == (u32)G::SEGS - 1;
        if (final) p.arrived[tile] = 0;
    }
    __syncthreads();
    if (!final) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float v = __ldcg(part(0, i));
#pragma unroll
        for (int s = 1; s < G::SEGS; s++) v = __fadd_rn(v, __ldcg(part(s, i)));
        sums[i >> 4][i >> 2 & 3][i & 3] = v;
    }
    return true;
}

template <class G> DEV void wide(const GemmArgs &p) {
    __shared__ float roots[WIDE];
    launch_next();
    int unit = blockIdx.y, start;
    const int which = choose_matrix<G>(unit, start, TILES);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, wm = warp & 3, wn = warp >> 2;
    const int column0 = blockIdx.x * WIDE, columns = min(WIDE, p.columns - column0);
    const bool apart = gridDim.z > 1;
    const int from = apart ? blockIdx.z * G::SEG : 0, to = apart ? min(from + G::SEG, G::PAIRS) : G::PAIRS;
    wait_previous(p.trace);
    float value[2][4][4];
    if (Kind<G>::SAME || which == 0) accumulate_wide<G, G::F0>(p, matrix_of(p, which), unit, from, to, roots, value);
    else if (which == 1) accumulate_wide<G, G::F1>(p, p.matrix[1], unit, from, to, roots, value);
    else accumulate_wide<G, G::F2>(p, p.matrix[2], unit, from, to, roots, value);
    if (apart && !join_segments<G>(p, value)) return;
    float *sums = (float *)dynamic_shared;
    // sixteen rows a column, and four floats between columns of a tile so that banks differ
    constexpr int COLUMN = 20, TILE = WIDE * COLUMN;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(wm * 2 + r) * TILE + (wn * 32 + n * 8 + 2 * t + (i & 1)) * COLUMN + g + 8 * (i >> 1)] = value[r][n][i];
    __syncthreads();
#pragma unroll 1
    for (int u = 0; u < TILES / G::MT; u++) {
        const int own = unit * (TILES / G::MT) + u;
        // four columns' residuals are asked for together
#pragma unroll 1
        for (int c0 = warp; c0 < columns; c0 += 4 * WARPS) {
            Ahead<G> ahead[4];
#pragma unroll
            for (int k = 0; k < 4; k++) ahead[k].load(p, column0 + c0 + k * WARPS, own, c0 + k * WARPS < columns);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int c = c0 + k * WARPS;
                if (c >= columns) break;
                finish_column<G, 1>(p, which, start, own, column0 + c, sums + u * G::MT * TILE + c * COLUMN, TILE, 0, ahead[k], G::NORM ? roots[c] : 1.0f);
            }
        }
    }
}
