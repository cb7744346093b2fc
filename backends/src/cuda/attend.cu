// Attention over the paged cache on tensor cores, in spans of 128 positions whose sums are merged in order: a row has the
// same bits whether its spans are computed by one thread block or by many.
//
// Of a block of 32 tokens the cache holds, for each key/value head, keys as [slot][HD] and values as [HD][slot]: halves, or
// bytes with a half's scale for 32 values of a token, those of keys as [slot][HD / 32], of values as [HD / 32][slot].
// Queries are split into two halves each (high and low), so that scores have nearly f32's precision.

struct CacheArgs {
    const float *qkv;       // [row][stride]: q, k, v
    const float *q_norm, *k_norm;
    const float2 *angles;   // [row][ANGLES], this layer's rope from `ANGLE0` on
    u16 *keys, *values;     // [block][kv head][...]
    u16 *key_scales, *value_scales;
    const int *position, *table, *blocks;
    u64 *trace;
};

struct AttendArgs {
    CacheArgs c;
    const int *tile_row;    // first row of each tile (whole tiles)
    const int *tile_rows;   // rows of it
    float *partial;         // [span][head][HD + 2]
    const int *partial_at;  // [row]: its first span there
    u32 *arrived;           // [row][kv head]
    Acts next;
};

// G: HD, HEADS, KV_HEADS, STRIDE, ROT (pairs that rotate), ADJACENT, ANGLES, ANGLE0, SCALE, WINDOW (0: none), CAP,
//   Q_NORM, K_NORM, EPS, BYTES (of the cache, not halves), FORMS, NEXT_PAIRS

// What preparing a head needs of its row and layer; it can be there before the head is.
template <class G> struct Rotation {
    float2 angles[(G::ROT + 31) / 32 + 1];

    INLINE void load(const CacheArgs &p, int row) {
        const int lane = threadIdx.x & 31;
        const float2 *from = p.angles + (long long)row * G::ANGLES + G::ANGLE0;
#pragma unroll
        for (int i = 0; i < G::ROT; i += 32) angles[i / 32] = i + lane < G::ROT ? from[i + lane] : make_float2(1, 0);
    }
};

// Norm and rotation of one head, a warp together; `v` is shared memory for HD values.
template <class G> DEV void prepare_head(float *v, const float *from, const float *norm, const Rotation<G> &rotation) {
    const int lane = threadIdx.x & 31;
    float squares = 0, x[G::HD / 32];
#pragma unroll
    for (int i = 0; i < G::HD; i += 32) x[i / 32] = from[i + lane];
#pragma unroll
    for (int i = 0; i < G::HD; i += 32) squares = __fmaf_rn(x[i / 32], x[i / 32], squares);
    if (norm) {
        const float root = __frsqrt_rn(__fadd_rn(__fdiv_rn(warp_sum(squares), (float)G::HD), G::EPS));
#pragma unroll
        for (int i = 0; i < G::HD; i += 32) x[i / 32] = __fmul_rn(__fmul_rn(x[i / 32], root), norm[i + lane]);
    }
#pragma unroll
    for (int i = 0; i < G::HD; i += 32) v[i + lane] = x[i / 32];
    __syncwarp();
#pragma unroll
    for (int i0 = 0; i0 < G::ROT; i0 += 32) {
        const int i = i0 + lane;
        if (i >= G::ROT) break;
        const float2 a = rotation.angles[i0 / 32];
        const int j = G::ADJACENT ? 2 * i : i, k = G::ADJACENT ? 2 * i + 1 : i + G::ROT;
        const float x = v[j], y = v[k];
        v[j] = __fsub_rn(__fmul_rn(x, a.x), __fmul_rn(y, a.y));
        v[k] = __fadd_rn(__fmul_rn(x, a.y), __fmul_rn(y, a.x));
    }
    __syncwarp();
}

// Key (0) or value (1) of one row and head into the cache, by a warp. `kept` is shared memory that gets it too, or none.
template <class G>
DEV void write_cache(const CacheArgs &p, int row, int head, int which, int position, int block, const Rotation<G> &rotation,
                     float *room, u16 *kept) {
    const int lane = threadIdx.x & 31, slot = position % BLOCK_TOKENS;
    const long long at = (long long)block * G::KV_HEADS + head;
    const float *from = p.qkv + (long long)row * G::STRIDE + (G::HEADS + (which ? G::KV_HEADS : 0) + head) * G::HD;
    if (which == 0) prepare_head<G>(room, from, G::K_NORM ? p.k_norm : 0, rotation);
#pragma unroll
    for (int i = 0; i < G::HD; i += 32) {
        const float x = which ? from[i + lane] : room[i + lane];
        const long long place = which ? (at * G::HD + i + lane) * BLOCK_TOKENS + slot : (at * BLOCK_TOKENS + slot) * G::HD + i + lane;
        u16 *cache = which ? p.values : p.keys;
        u16 h;
        if (G::BYTES) {
            const u32 top = __reduce_max_sync(ALL, __float_as_uint(x) & 0x7fffffffu);
            const u16 scale = float_to_half(__fmul_rn(__uint_as_float(top), 1.0f / 127.0f));
            const float d = half_to_float(scale);
            const int q = max(-127, min(127, __float2int_rn(d > 0 ? __fdiv_rn(x, d) : 0.0f)));
            ((i8 *)cache)[place] = (i8)q;
            if (lane == 0) {
                if (which) p.value_scales[(at * (G::HD / 32) + i / 32) * BLOCK_TOKENS + slot] = scale;
                else p.key_scales[(at * BLOCK_TOKENS + slot) * (G::HD / 32) + i / 32] = scale;
            }
            h = float_to_half(__fmul_rn(d, (float)q));
        } else cache[place] = h = float_to_half(x);
        if (kept) kept[i + lane] = h;
    }
}

// All rows of a batch; blockIdx.x is the row. 256 threads.
template <class G> DEV void fill_cache(const CacheArgs &p) {
    launch_next();
    __shared__ float room[8][G::HD];
    const int warp = threadIdx.x >> 5, row = blockIdx.x, position = p.position[row];
    const int block = p.blocks[p.table[row] + position / BLOCK_TOKENS];
    Rotation<G> rotation;
    rotation.load(p, row);
    wait_previous(p.trace);
    for (int i = warp; i < 2 * G::KV_HEADS; i += 8)
        write_cache<G>(p, row, i >> 1, i & 1, position, block, rotation, room[warp], 0);
}

// Shared memory of a tile of 16 MT query rows.
template <class G, int MT> struct Shared {
    // a lane reads sixteen bytes; rows are padded so that two rows' lie in different banks
    static constexpr int Q = G::HD + (G::HD % 64 ? 64 : 32), S = SPAN + 4, P = SPAN + 32;
    u16 high[MT * 16][Q], low[MT * 16][Q];
    union {
        float scores[MT * 16][S];
        float out[MT * 16][G::HD + 4];
        float room[8][G::HD];
    };
    u16 p[MT * 16][P];
    u16 key[G::HD], value[G::HD];             // of the row itself, where one is attended to
    float most[MT * 16], sum[MT * 16];       // of the span
    float all_most[MT * 16], all_sum[MT * 16]; // of the spans so far
    float old_scale[MT * 16], new_scale[MT * 16];
};

// How two partial softmaxes combine: factors of the sums so far and of the new ones.
DEV void combine(float most, float more, float &scale, float &scale_more, float &most_of_both) {
    most_of_both = fmaxf(most, more);
    scale = most == -INF ? 0.0f : exp_(__fsub_rn(most, most_of_both));
    scale_more = more == -INF ? 0.0f : exp_(__fsub_rn(more, most_of_both));
}

// A half of `w`, the upper for an odd place, becomes `one`.
DEV u32 replace(u32 w, bool here, int place, u32 one) {
    return !here ? w : place & 1 ? (w & 0xffffu) | one << 16 : (w & 0xffff0000u) | one;
}

// Eight bytes and their scales as eight halves.
DEV u32 two_halves(u32 bytes, int from, float d0, float d1) {
    const u16 a = float_to_half(__fmul_rn(d0, (float)(i8)(bytes >> from))), b = float_to_half(__fmul_rn(d1, (float)(i8)(bytes >> (from + 8))));
    return a | (u32)b << 16;
}
DEV uint4 eight_halves(uint2 q, uint4 d) {
    return make_uint4(two_halves(q.x, 0, low_half(d.x), high_half(d.x)), two_halves(q.x, 16, low_half(d.y), high_half(d.y)),
                      two_halves(q.y, 0, low_half(d.z), high_half(d.z)), two_halves(q.y, 16, low_half(d.w), high_half(d.w)));
}

// A lane's part of the keys and values of a span: keys of the warp's sixteen, values of the warp's columns.
template <class G> struct Span {
    static constexpr int NTO = (G::HD / 8 + 7) / 8;
    uint4 k[G::HD / 32][2], v[NTO][4];

    INLINE void load_keys(const CacheArgs &p, int kv_head, int span, int table, int last) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        const int index = span * 4 + (warp >> 1);
        const bool there = index * BLOCK_TOKENS <= last;
        const long long block = there ? (long long)p.blocks[table + index] * G::KV_HEADS + kv_head : 0;
        const long long first = block * BLOCK_TOKENS + (warp & 1) * 16 + g;
#pragma unroll
        for (int h = 0; h < G::HD; h += 32)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const long long slot = first + n * 8, at = slot * G::HD + h + t * 8;
                uint4 v = make_uint4(0, 0, 0, 0);
                if (there) {
                    if (G::BYTES) {
                        const u32 d = p.key_scales[slot * (G::HD / 32) + h / 32], both = d | d << 16;
                        v = eight_halves(*(const uint2 *)((const u8 *)p.keys + at), make_uint4(both, both, both, both));
                    } else v = *(const uint4 *)(p.keys + at);
                }
                k[h / 32][n] = v;
            }
    }
    INLINE void load_values(const CacheArgs &p, int kv_head, int span, int table, int last) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const int index = span * 4 + b;
            const bool there = index * BLOCK_TOKENS <= last;
            const long long block = there ? (long long)p.blocks[table + index] * G::KV_HEADS + kv_head : 0;
#pragma unroll
            for (int i = 0; i < NTO; i++) {
                const int n = warp + i * 8;
                const long long at = (block * G::HD + n * 8 + g) * BLOCK_TOKENS + t * 8;
                v[i][b] = make_uint4(0, 0, 0, 0);
                if (there && n * 8 < G::HD) {
                    if (G::BYTES) {
                        const u16 *d = p.value_scales + (block * (G::HD / 32) + n / 4) * BLOCK_TOKENS + t * 8;
                        v[i][b] = eight_halves(*(const uint2 *)((const u8 *)p.values + at), *(const uint4 *)d);
                    } else v[i][b] = *(const uint4 *)(p.values + at);
                }
            }
        }
    }
    // The row's own key and value, which were not in the cache when it was read; `at` is its place in the span.
    INLINE void put(const u16 *key, const u16 *value, int at) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < G::HD; h += 32)
                if (warp * 16 + n * 8 + g == at) k[h / 32][n] = *(const uint4 *)(key + h + t * 8);
        const bool own = (at & 31) >> 3 == t;
#pragma unroll
        for (int i = 0; i < NTO; i++) {
            const int n = warp + i * 8;
            const u32 one = own && n * 8 < G::HD ? value[n * 8 + g] : 0;
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const int word = own && at >> 5 == b ? (at & 7) >> 1 : -1;
                v[i][b].x = replace(v[i][b].x, word == 0, at, one);
                v[i][b].y = replace(v[i][b].y, word == 1, at, one);
                v[i][b].z = replace(v[i][b].z, word == 2, at, one);
                v[i][b].w = replace(v[i][b].w, word == 3, at, one);
            }
        }
    }
};

// Scores and softmax of one span for a tile, into shared memory.
template <class G, int MT, class S>
DEV void attend_scores(const CacheArgs &p, S &s, const Span<G> &kv, int span, int rows, int first) {
    constexpr int GROUP = G::HEADS / G::KV_HEADS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    float c[MT][2][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0;
#pragma unroll
    for (int h = 0; h < G::HD; h += 32)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int at = h + t * 8;
            const uint4 h0 = *(const uint4 *)&s.high[m * 16 + g][at], h1 = *(const uint4 *)&s.high[m * 16 + g + 8][at];
            const uint4 l0 = *(const uint4 *)&s.low[m * 16 + g][at], l1 = *(const uint4 *)&s.low[m * 16 + g + 8][at];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint4 k = kv.k[h / 32][n];
                mma_f16(c[m][n], h0.x, h1.x, h0.y, h1.y, k.x, k.y);
                mma_f16(c[m][n], l0.x, l1.x, l0.y, l1.y, k.x, k.y);
                mma_f16(c[m][n], h0.z, h1.z, h0.w, h1.w, k.z, k.w);
                mma_f16(c[m][n], l0.z, l1.z, l0.w, l1.w, k.z, k.w);
            }
        }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = m * 16 + g + 8 * (i >> 1), key = warp * 16 + n * 8 + 2 * t + (i & 1);
                const int position = first + r / GROUP, at = span * SPAN + key;
                float v = c[m][n][i];
                if (G::CAP > 0) v = __fmul_rn(G::CAP, tanhf(__fdiv_rn(v, G::CAP)));
                const bool seen = r < rows * GROUP && at <= position && (G::WINDOW == 0 || at > position - G::WINDOW);
                s.scores[r][key] = seen ? v : -INF;
            }
    __syncthreads();
    // sixteen threads a row, eight keys each
#pragma unroll
    for (int r = threadIdx.x >> 4; r < MT * 16; r += 16) {
        const int part = threadIdx.x & 15;
        float v[8], most = -INF;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 four = *(const float4 *)&s.scores[r][part * 8 + i];
            v[i] = four.x; v[i + 1] = four.y; v[i + 2] = four.z; v[i + 3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) most = fmaxf(most, v[i]);
#pragma unroll
        for (int o = 8; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, o));
        float sum = 0;
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u16 e = float_to_half(v[i] == -INF ? 0.0f : exp_(__fsub_rn(v[i], most)));
            sum = __fadd_rn(sum, half_to_float(e));
            words[i >> 1] = i & 1 ? words[i >> 1] | (u32)e << 16 : e;
        }
        *(uint4 *)&s.p[r][part * 8] = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
        for (int o = 8; o; o >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(ALL, sum, o));
        if (part == 0) { s.most[r] = most; s.sum[r] = sum; }
    }
    __syncthreads();
}

// The weighted sum of a span's values; o[m][i] are the outputs of the warp's i-th eight columns.
template <class G, int MT, class S> DEV void attend_values(S &s, const Span<G> &kv, float o[MT][Span<G>::NTO][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < Span<G>::NTO; i++) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int j = 0; j < 4; j++) o[m][i][j] = 0;
        if ((warp + i * 8) * 8 >= G::HD) continue;
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const int at = b * 32 + t * 8;
                const uint4 a0 = *(const uint4 *)&s.p[m * 16 + g][at], a1 = *(const uint4 *)&s.p[m * 16 + g + 8][at], v = kv.v[i][b];
                mma_f16(o[m][i], a0.x, a1.x, a0.y, a1.y, v.x, v.y);
                mma_f16(o[m][i], a0.z, a1.z, a0.w, a1.w, v.z, v.w);
            }
    }
}

// One row of queries into shared memory, scaled, by a warp.
template <class G, class S>
DEV void load_query(const CacheArgs &p, S &s, float *room, int r, int row, int head, const Rotation<G> &rotation) {
    const int lane = threadIdx.x & 31;
    prepare_head<G>(room, p.qkv + (long long)row * G::STRIDE + head * G::HD, G::Q_NORM ? p.q_norm : 0, rotation);
#pragma unroll
    for (int i = 0; i < G::HD; i += 32) {
        const float q = __fmul_rn(room[i + lane], G::SCALE);
        const u16 high = float_to_half(q);
        s.high[r][i + lane] = high;
        s.low[r][i + lane] = float_to_half(__fsub_rn(q, half_to_float(high)));
    }
    __syncwarp();
}

template <class G, class S> DEV void no_queries(S &s, int from, int to) {
    for (int i = from * G::HD + threadIdx.x; i < to * G::HD; i += 256) s.high[i / G::HD][i % G::HD] = s.low[i / G::HD][i % G::HD] = 0;
}

// Sums of a tile, in shared memory, to the input of the next product.
template <class G, class S> DEV void store_out(const AttendArgs &p, S &s, int kv_head, int row0, int rows) {
    constexpr int GROUP = G::HEADS / G::KV_HEADS, EACH = G::HD / 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = warp; i < rows * GROUP * EACH; i += 8) {
        const int r = i / EACH, head = kv_head * GROUP + r % GROUP, at = i % EACH;
        const float v = __fdiv_rn(s.out[r][at * 32 + lane], s.all_sum[r]);
        store_block<G::FORMS>(p.next, row0 + r / GROUP, G::NEXT_PAIRS, head * EACH + at, v);
    }
}

// Calls `take(row, column, value)` for every output of a tile that this thread holds.
template <class G, int MT, class Take> DEV void each_output(float o[MT][Span<G>::NTO][4], Take take) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < Span<G>::NTO; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = (warp + i * 8) * 8 + 2 * t + (j & 1);
                if (column < G::HD) take(m * 16 + g + 8 * (j >> 1), column, o[m][i][j]);
            }
}

// Tiles of rows of one sequence, every span by the same thread block: blockIdx (tile, kv head). Keys are in the cache.
template <class G, int MT> DEV void attend_tile(const AttendArgs &p) {
    constexpr int NTO = Span<G>::NTO, GROUP = G::HEADS / G::KV_HEADS;
    auto &s = *(Shared<G, MT> *)dynamic_shared;
    launch_next();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int row0 = p.tile_row[blockIdx.x], rows = p.tile_rows[blockIdx.x], kv_head = blockIdx.y;
    const int first = p.c.position[row0], last = first + rows - 1, table = p.c.table[row0];
    no_queries<G>(s, rows * GROUP, MT * 16);
    if (threadIdx.x < MT * 16) { s.all_most[threadIdx.x] = -INF; s.all_sum[threadIdx.x] = 0; }
    wait_previous(p.c.trace);
    for (int r = warp; r < rows * GROUP; r += 8) {
        Rotation<G> rotation;
        rotation.load(p.c, row0 + r / GROUP);
        load_query<G>(p.c, s, s.room[warp], r, row0 + r / GROUP, kv_head * GROUP + r % GROUP, rotation);
    }
    __syncthreads();
    float all[MT][NTO][4], o[MT][NTO][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < NTO; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) all[m][i][j] = 0;
    const int from = G::WINDOW ? max(0, first - G::WINDOW + 1) / SPAN : 0;
    Span<G> kv;
    kv.load_keys(p.c, kv_head, from, table, last);
    for (int span = from; span <= last / SPAN; span++) {
        // values come while scores are computed, and the next span's keys while values are added
        kv.load_values(p.c, kv_head, span, table, last);
        attend_scores<G, MT>(p.c, s, kv, span, rows, first);
        if (span < last / SPAN) kv.load_keys(p.c, kv_head, span + 1, table, last);
        attend_values<G, MT>(s, kv, o);
        if (threadIdx.x < MT * 16) {
            const int r = threadIdx.x;
            float both;
            combine(s.all_most[r], s.most[r], s.old_scale[r], s.new_scale[r], both);
            s.all_most[r] = both;
            s.all_sum[r] = __fmaf_rn(s.all_sum[r], s.old_scale[r], __fmul_rn(s.sum[r], s.new_scale[r]));
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < NTO; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int r = m * 16 + g + 8 * (j >> 1);
                    all[m][i][j] = __fmaf_rn(all[m][i][j], s.old_scale[r], __fmul_rn(o[m][i][j], s.new_scale[r]));
                }
    }
    __syncthreads();
    each_output<G, MT>(all, [&](int r, int column, float v) { s.out[r][column] = v; });
    __syncthreads();
    store_out<G>(p, s, kv_head, row0, rows);
}

// One row a sequence, one thread block a span: blockIdx (kv head, span, row). Writes the row's own key and value. The
// last of a row's thread blocks merges what the others left. What earlier steps left in the cache is read before the
// queries are there: only this step's own key and value come with them.
// FILLED: the cache has the rows' own keys and values already, written by the kernel ahead.
template <class G, int MT, bool FILLED> DEV void attend_split(const AttendArgs &p) {
    constexpr int NTO = Span<G>::NTO, GROUP = G::HEADS / G::KV_HEADS;
    auto &s = *(Shared<G, MT> *)dynamic_shared;
    __shared__ bool final;
    launch_next();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int kv_head = blockIdx.x, row = blockIdx.z;
    const int position = p.c.position[row], table = p.c.table[row];
    const int from = G::WINDOW ? max(0, position - G::WINDOW + 1) / SPAN : 0, to = position / SPAN;
    const int span = from + blockIdx.y, spans = to - from + 1;
    if (span > to) { wait_previous(p.c.trace); return; }
    Rotation<G> rotation;
    rotation.load(p.c, row);
    Span<G> kv;
    if (FILLED) wait_previous(p.c.trace);
    kv.load_keys(p.c, kv_head, span, table, position);
    kv.load_values(p.c, kv_head, span, table, position);
    const int block = p.c.blocks[table + position / BLOCK_TOKENS];
    no_queries<G>(s, GROUP, MT * 16);
    if (!FILLED) wait_previous(p.c.trace);
    const int askers = !FILLED && span == to ? 6 : 8;
    if (warp >= askers) write_cache<G>(p.c, row, kv_head, warp - askers, position, block, rotation, s.room[warp], warp == 6 ? s.key : s.value);
    else
        for (int r = warp; r < GROUP; r += askers) load_query<G>(p.c, s, s.room[warp], r, row, kv_head * GROUP + r, rotation);
    __syncthreads();
    if (!FILLED && span == to) kv.put(s.key, s.value, position % SPAN);
    float o[MT][NTO][4];
    attend_scores<G, MT>(p.c, s, kv, span, 1, position);
    attend_values<G, MT>(s, kv, o);
    if (spans == 1) {
        // merging with nothing changes no bit
        if (threadIdx.x < MT * 16) s.all_sum[threadIdx.x] = s.sum[threadIdx.x];
        each_output<G, MT>(o, [&](int r, int column, float v) { s.out[r][column] = v; });
        __syncthreads();
        store_out<G>(p, s, kv_head, row, 1);
        return;
    }
    const int partial_at = p.partial_at[row];
    auto part = [&](int r, int i) { return p.partial + ((long long)(partial_at + i) * G::HEADS + kv_head * GROUP + r) * (G::HD + 2); };
    each_output<G, MT>(o, [&](int r, int column, float v) {
        if (r < GROUP) __stcg(part(r, blockIdx.y) + column, v);
    });
    if (threadIdx.x < GROUP) {
        __stcg(part(threadIdx.x, blockIdx.y) + G::HD, s.most[threadIdx.x]);
        __stcg(part(threadIdx.x, blockIdx.y) + G::HD + 1, s.sum[threadIdx.x]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *arrived = p.arrived + row * G::KV_HEADS + kv_head;
        final = atomicAdd(arrived, 1) == (u32)spans - 1;
        if (final) *arrived = 0;
    }
    __syncthreads();
    if (!final) return;
    __threadfence();
    for (int r = warp; r < GROUP; r += 8) {
        float most = -INF, sum = 0, out[G::HD / 32];
#pragma unroll
        for (int j = 0; j < G::HD / 32; j++) out[j] = 0;
#pragma unroll 4
        for (int i = 0; i < spans; i++) {
            const float *from = part(r, i);
            float old_scale, new_scale, both;
            combine(most, __ldcg(from + G::HD), old_scale, new_scale, both);
            most = both;
            sum = __fmaf_rn(sum, old_scale, __fmul_rn(__ldcg(from + G::HD + 1), new_scale));
#pragma unroll
            for (int j = 0; j < G::HD / 32; j++)
                out[j] = __fmaf_rn(out[j], old_scale, __fmul_rn(__ldcg(from + j * 32 + lane), new_scale));
        }
        if (lane == 0) s.all_sum[r] = sum;
#pragma unroll
        for (int j = 0; j < G::HD / 32; j++) s.out[r][j * 32 + lane] = out[j];
    }
    __syncthreads();
    store_out<G>(p, s, kv_head, row, 1);
}
