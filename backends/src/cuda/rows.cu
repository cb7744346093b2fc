// Steps that work on whole rows: embedding, sums that pass a norm of their own, sampling.

// One value of a matrix in its packed form.
template <int F> DEV float weight(const Matrix &m, int pairs, int row, int k) {
    using T = Format<F>;
    const int tile = row >> 4, g = row & 7, half = row >> 3 & 1, pair = k >> 6;
    const long long at = (long long)tile * pairs + pair;
    if (T::HALF) {
        const int step = k >> 4 & 3, t = (k & 15) >> 2, j = k & 3, lane = g * 4 + t;
        float v = 0;
#pragma unroll
        for (int part = 0; part < T::Q / 4; part++) {
            const u16 *w = (const u16 *)(m.q + (at * T::Q + part * 4 + step) * 32 + lane);
            const u16 bits = w[(j >> 1) * 4 + half * 2 + (j & 1)];
            v = __fadd_rn(v, F == F_F16 ? half_to_float(bits) : bf16_to_float(bits));
        }
        return v;
    }
    const int b = k >> 5 & 1, t = (k & 15) >> 2, upper = k >> 4 & 1, j = k & 3, lane = g * 4 + t, r = upper * 2 + half;
    Tile<F> tile_;
    // only the words that hold this value
    const u32 *words = (const u32 *)(m.q + at * T::Q * 32);
    int q;
    if (T::Q == 2) q = (i8)(words[(b * 32 + lane) * 4 + r] >> (8 * j));
    else q = words[lane * 4 + b * 2 + half] >> (8 * j + 4 * upper) & 15;
    if (T::H == 1) q |= (m.high[at * 32 + lane] >> (8 * j + r + 4 * b) & 1) << 4;
    if (T::H == 2) q = ((q | (m.high[(at * 2 + b) * 32 + lane] >> (8 * j + 2 * r) & 3) << 4) ^ 32) - 32;
    if (T::S == 1) tile_.s[0] = m.s[at * 8 + g];
    if (T::S == 2) {
        tile_.s[0] = m.s[(at * 8 + g) * 2];
        tile_.s[1] = m.s[(at * 8 + g) * 2 + 1];
    }
    const long long sat = ((long long)tile * ((pairs + 3) / 4) + pair / 4) * 8 + g;
    if (T::SUPER == 2) {
        tile_.super[0] = m.super[sat * 2];
        tile_.super[1] = m.super[sat * 2 + 1];
    } else if (T::SUPER == 1) tile_.super[0] = m.super[sat];
    float d[2], least[2];
    tile_.scales(b, d, least);
    if (T::K16) return __fmul_rn(__fmul_rn(d[half], (float)tile_.small(b, half, upper)), (float)q);
    if (T::MIN) return __fmaf_rn(d[half], (float)q, least[half]);
    return __fmul_rn(d[half], (float)q);
}

struct EnterArgs {
    Matrix table;
    const int *ids;    // [rows]; -1: what the slot sampled last; -2: the row is there already
    const int *slots;
    const int *last;   // [slots]
    const int *positions;
    float *x;          // [rows][hidden]
    float2 *angles;    // [row][pairs of all ropes]: cosine, sine
    const double *frequencies;
    const float *magnitudes; // one a pair
    const float *gain;       // of the first norm
    Acts next;
    u64 *trace;
};

// The embedding, and the angles of every row. FORMS: of what the first step reads, whose root comes with the product; 0:
// that is left to `settle`.
template <int F, int PAIRS, int HIDDEN, int ANGLES, int FORMS>
DEV void enter(const EnterArgs &p, float scale) {
    // the next kernels may read angles before they wait: they start when all this is done
    wait_previous(p.trace);
    const int row = blockIdx.x;
    int id = p.ids[row];
    if (id == -1) id = p.last[p.slots[row]];
    for (int k = blockIdx.y * 256 + threadIdx.x; k < HIDDEN; k += 256 * gridDim.y) {
        float *x = p.x + (long long)row * HIDDEN + k;
        if (F >= 0 && id >= 0) *x = __fmul_rn(weight<(F < 0 ? 0 : F)>(p.table, PAIRS, id, k), scale);
        if (FORMS) store_residual<FORMS>(p.next, row, (HIDDEN + 63) / 64, HIDDEN / 32, k / 32, *x, p.gain[k]);
    }
    for (int i = threadIdx.x; i < ANGLES && blockIdx.y == 0; i += 256) {
        double s, c;
        sincos((double)p.positions[row] * p.frequencies[i], &s, &c);
        const float magnitude = p.magnitudes[i];
        p.angles[(long long)row * ANGLES + i] = make_float2(__fmul_rn((float)c, magnitude), __fmul_rn((float)s, magnitude));
    }
}

// A sum over the thread block in a fixed order.
DEV float block_sum(float v, float *room) {
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < blockDim.x / 32; i++) sum = __fadd_rn(sum, room[i]);
    return sum;
}

struct SettleArgs {
    float *x;           // [rows][hidden]
    const float *y;     // [rows][hidden]: a sum that waits
    const float *post;  // gain and bias of its norm
    const float *post_bias;
    const float *gain;  // of the norm of the step that comes
    const float *bias;
    Acts next;
    u64 *trace;
};

// KIND: 0 none, 1 root mean square, 2 layer norm
template <int HIDDEN, int KIND>
DEV void normalise(float *v, const float *gain, const float *bias, float eps, float *room) {
    constexpr int EACH = (HIDDEN + 255) / 256;
    float sum = 0;
    if (KIND == 2) {
#pragma unroll
        for (int i = 0; i < EACH; i++) sum = __fadd_rn(sum, v[i]);
        const float mean = __fdiv_rn(block_sum(sum, room), (float)HIDDEN);
#pragma unroll
        for (int i = 0; i < EACH; i++) if (i * 256 + threadIdx.x < HIDDEN) v[i] = __fsub_rn(v[i], mean);
        sum = 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) sum = __fmaf_rn(v[i], v[i], sum);
    const float root = __frsqrt_rn(__fadd_rn(__fdiv_rn(block_sum(sum, room), (float)HIDDEN), eps));
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int k = i * 256 + threadIdx.x;
        if (k < HIDDEN) v[i] = __fadd_rn(__fmul_rn(__fmul_rn(v[i], root), gain[k]), bias ? bias[k] : 0.0f);
    }
}

// x += post(y); then the input of the next step. NORM: 0 leave it; 1 gain only, the root comes with the product; 2 layer
// norm; 3 root mean square with a bias. 256 threads a row; or, where blocks don't depend on each other, for each 256 values.
template <int HIDDEN, int POST, int NORM, int FORMS>
DEV void settle(const SettleArgs &p, float post_eps, float eps) {
    launch_next();
    wait_previous(p.trace);
    __shared__ float room[8];
    constexpr int EACH = (HIDDEN + 255) / 256;
    constexpr bool SPREAD = !POST && NORM == 1;
    const int row = blockIdx.x;
    float v[EACH], x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (SPREAD && i != blockIdx.y) continue;
        const int k = i * 256 + threadIdx.x;
        x[i] = k < HIDDEN ? p.x[(long long)row * HIDDEN + k] : 0;
        if (POST) v[i] = k < HIDDEN ? p.y[(long long)row * HIDDEN + k] : 0;
    }
    if (POST) {
        normalise<HIDDEN, POST>(v, p.post, p.post_bias, post_eps, room);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = i * 256 + threadIdx.x;
            if (k < HIDDEN) p.x[(long long)row * HIDDEN + k] = x[i] = __fadd_rn(x[i], v[i]);
        }
    }
    if (NORM >= 2) normalise<HIDDEN, NORM == 2 ? 2 : 1>(x, p.gain, p.bias, eps, room);
    constexpr int PAIRS = (HIDDEN + 63) / 64;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int k = i * 256 + threadIdx.x;
        if ((SPREAD && i != blockIdx.y) || k / 32 * 32 >= HIDDEN) continue;
        if (NORM == 1) store_residual<FORMS>(p.next, row, PAIRS, HIDDEN / 32, k / 32, x[i], p.gain[k]);
        if (NORM >= 2) store_block<FORMS>(p.next, row, PAIRS, k / 32, x[i]);
    }
}

// ---- Sampling: the rule of sampling.rs for requests without penalties, biases and masks.

struct Choice {
    float inverse;     // 1 / temperature; 0: greedy
    float floor;       // smallest scaled logit that may win
    u32 key0, key1;    // seed
    u32 position;
    int slot;
    int place;         // where the id goes in `out`
    u32 top_k;         // 0: all
    float top_p;       // 1: all
};

struct SampleArgs {
    const float *logits;   // [rows][vocab]
    const Choice *choices; // [rows]
    float2 *most;          // [rows][CHUNKS]: the largest of a chunk, and its id
    float2 *best;
    u64 *cut;              // [rows]: the last entry that may win; none where no row is truncated
    u32 *arrived;          // [rows]
    int *last;             // [slots]
    int *out;              // mapped host memory: ids of this step
    u32 *flag;             // mapped host memory: steps done
    const u32 *step;       // number of this step
    u32 *rows_done;
    u64 *trace;
    int rows;
};

#define CHUNKS 64

DEV float clean(float l) { return l != l ? -INF : fminf(l, 1e30f); }
DEV bool beats(float a, int ia, float b, int ib) { return a > b || (a == b && (u32)ia < (u32)ib); }

DEV void best_of_block(float &v, int &id, float *room, int *ids) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float w = __shfl_xor_sync(ALL, v, o);
        const int other = __shfl_xor_sync(ALL, id, o);
        if (beats(w, other, v, id)) { v = w; id = other; }
    }
    if ((threadIdx.x & 31) == 0) { room[threadIdx.x >> 5] = v; ids[threadIdx.x >> 5] = id; }
    __syncthreads();
    v = room[0]; id = ids[0];
    for (int i = 1; i < blockDim.x / 32; i++) if (beats(room[i], ids[i], v, id)) { v = room[i]; id = ids[i]; }
    __syncthreads();
}

// The best of what thread blocks found in their chunks of a row. Read around the first-level cache, since blocks of the
// same kernel may have written it.
DEV void best_of_chunks(const float2 *chunks, float &v, int &id, float *room, int *ids) {
    v = -INF;
    id = 0x7fffffff;
    if (threadIdx.x < CHUNKS) {
        const float2 found = __ldcg(chunks + threadIdx.x);
        v = found.x;
        id = __float_as_int(found.y);
    }
    best_of_block(v, id, room, ids);
}

// A row's id to where it is wanted; the last row says that the step is done.
DEV void sampled(const SampleArgs &p, int row, const Choice &choice, int id) {
    p.arrived[row] = 0;
    p.last[choice.slot] = id;
    p.out[choice.place] = id;
    __threadfence_system();
    if (atomicAdd(p.rows_done, 1) == p.rows - 1) {
        *p.rows_done = 0;
        __threadfence_system();
        *(volatile u32 *)p.flag = *p.step;
    }
}

// The largest of each chunk of a row. GREEDY: the largest of all is the choice.
template <int VOCAB, bool GREEDY> DEV void sample_most(const SampleArgs &p) {
    launch_next();
    wait_previous(p.trace);
    __shared__ float room[8];
    __shared__ int ids[8];
    __shared__ bool final;
    constexpr int EACH = (VOCAB + CHUNKS - 1) / CHUNKS;
    const int row = blockIdx.y, from = blockIdx.x * EACH, to = min(from + EACH, VOCAB);
    float v = -INF;
    int id = 0x7fffffff;
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
        const float l = clean(p.logits[(long long)row * VOCAB + i]);
        if (beats(l, i, v, id)) { v = l; id = i; }
    }
    best_of_block(v, id, room, ids);
    if (threadIdx.x == 0) {
        p.most[row * CHUNKS + blockIdx.x] = make_float2(v, __int_as_float(id));
        if (GREEDY) {
            __threadfence();
            final = atomicAdd(p.arrived + row, 1) == CHUNKS - 1;
        }
    }
    if (!GREEDY) return;
    __syncthreads();
    if (!final) return;
    __threadfence();
    best_of_chunks(p.most + row * CHUNKS, v, id, room, ids);
    if (threadIdx.x == 0) sampled(p, row, p.choices[row], v == -INF ? 0 : id);
}

DEV u32 philox(u32 c0, u32 c1, u32 k0, u32 k1, int word) {
    u32 c2 = 0, c3 = 0;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 ah = __umulhi(0xD2511F53u, c0), al = 0xD2511F53u * c0, bh = __umulhi(0xCD9E8D57u, c2), bl = 0xCD9E8D57u * c2;
        c0 = bh ^ c1 ^ k0; c1 = bl; c2 = ah ^ c3 ^ k1; c3 = al;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
}
DEV float gumbel(u32 word) {
    const double u = ((double)(word >> 8) + 0.5) / 16777216.0;
    return (float)(-log(-log(u)));
}
DEV float gumbel_bound(u32 word) {
    const float rest = __fmul_rn(__fadd_rn((float)(int)(~word >> 8), 0.5f), 1.0f / 16777216.0f);
    return __fmul_rn((float)(127 - (int)(__float_as_uint(rest) >> 23)), 0.693148f);
}

// A token and its logit as a number whose order is the rule's: larger logit first, then lower id.
DEV u64 entry(float logit, int id) {
    const u32 bits = __float_as_uint(__fadd_rn(logit, 0.0f)), ascending = bits >> 31 ? ~bits : bits | 1u << 31;
    return (u64)~ascending << 32 | (u32)id;
}

struct Cut {
    u64 masses[256], prefix, need;
    u32 counts[256], done;
};

// The last of the entries up to `limit` that a truncation leaves, found digit by digit: the `need`-th, or, with MASS, the
// one that brings their mass to at least `share` of all. Masses are whole numbers, so that their sums have no order.
template <int VOCAB, bool MASS>
DEV u64 select(const float *logits, float top, float inverse, u64 limit, u32 need, float share, Cut &s) {
    if (threadIdx.x == 0) { s.prefix = 0; s.need = need; }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) { s.counts[i] = 0; s.masses[i] = 0; }
        __syncthreads();
        const u64 prefix = s.prefix;
        for (int i = threadIdx.x; i < VOCAB; i += blockDim.x) {
            const float l = clean(logits[i]);
            const u64 e = entry(l, i);
            if (l == -INF || e > limit || (shift < 56 && (e ^ prefix) >> (shift + 8))) continue;
            const int digit = (int)(e >> shift & 255);
            atomicAdd(&s.counts[digit], 1u);
            if (MASS) {
                const float scaled = __fmul_rn(__fsub_rn(l, top), inverse);
                atomicAdd(&s.masses[digit], (u64)((double)exp_(scaled) * 1099511627776.0));
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            if (MASS && shift == 56) {
                u64 all = 0;
                for (int i = 0; i < 256; i++) all += s.masses[i];
                s.need = max((u64)1, (u64)((double)share * (double)all));
            }
            u64 before = 0, left = s.need;
            int digit = 0, last = 0;
            for (; digit < 256; digit++) {
                if (!s.counts[digit]) continue;
                last = digit;
                const u64 here = MASS ? s.masses[digit] : s.counts[digit];
                if (before + here >= left) break;
                before += here;
            }
            // rounding may leave the goal beyond all of them
            if (digit == 256) digit = last;
            s.need = left - min(before, left - 1);
            s.prefix = prefix | (u64)digit << shift;
            s.done = MASS ? s.counts[digit] == 1 : s.counts[digit] == s.need;
        }
        __syncthreads();
        if (s.done) return min(limit, s.prefix | (((u64)1 << shift) - 1));
    }
    return min(limit, s.prefix);
}

// What top-k and then top-p leave of a row: a thread block each.
template <int VOCAB> DEV void sample_cut(const SampleArgs &p) {
    launch_next();
    wait_previous(p.trace);
    __shared__ float room[32];
    __shared__ int ids[32];
    __shared__ Cut s;
    const int row = blockIdx.x;
    const Choice choice = p.choices[row];
    float top;
    int first;
    best_of_chunks(p.most + row * CHUNKS, top, first, room, ids);
    u64 cut = ~(u64)0;
    if (choice.inverse != 0 && top != -INF) {
        const float *logits = p.logits + (long long)row * VOCAB;
        if (choice.top_k != 0 && choice.top_k < VOCAB)
            cut = select<VOCAB, false>(logits, top, choice.inverse, cut, choice.top_k, 0, s);
        __syncthreads();
        if (choice.top_p < 1) cut = select<VOCAB, true>(logits, top, choice.inverse, cut, 0, choice.top_p, s);
    }
    if (threadIdx.x == 0) p.cut[row] = cut;
}

template <int VOCAB> DEV void sample_pick(const SampleArgs &p) {
    launch_next();
    wait_previous(p.trace);
    __shared__ float room[8];
    __shared__ int ids[8];
    __shared__ bool final;
    constexpr int EACH = (VOCAB + CHUNKS - 1) / CHUNKS;
    const int row = blockIdx.y;
    const Choice choice = p.choices[row];
    float top;
    int first;
    best_of_chunks(p.most + row * CHUNKS, top, first, room, ids);
    float v = -INF;
    int id = 0x7fffffff;
    const bool greedy = choice.inverse == 0 || top == -INF;
    if (greedy) {
        id = top == -INF ? 0 : first;
    } else {
        const int from = blockIdx.x * EACH, to = min(from + EACH, VOCAB);
        // what the likeliest gets is what the others have to beat
        const u64 cut = p.cut ? p.cut[row] : ~(u64)0;
        const float known = gumbel(philox(first / 4, choice.position, choice.key0, choice.key1, first & 3));
        for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
            const float l = clean(p.logits[(long long)row * VOCAB + i]);
            const float scaled = __fmul_rn(__fsub_rn(l, top), choice.inverse);
            if (entry(l, i) > cut || scaled < choice.floor || __fadd_rn(scaled, 17.32869f) < known) continue;
            const u32 word = philox(i / 4, choice.position, choice.key0, choice.key1, i & 3);
            if (__fadd_rn(scaled, gumbel_bound(word)) < known) continue;
            const float score = __fadd_rn(scaled, gumbel(word));
            if (beats(score, i, v, id)) { v = score; id = i; }
        }
        best_of_block(v, id, room, ids);
    }
    if (!greedy) {
        if (threadIdx.x == 0) {
            p.best[row * CHUNKS + blockIdx.x] = make_float2(v, __int_as_float(id));
            __threadfence();
            final = atomicAdd(p.arrived + row, 1) == CHUNKS - 1;
        }
        __syncthreads();
        if (!final) return;
        __threadfence();
        best_of_chunks(p.best + row * CHUNKS, v, id, room, ids);
    } else if (blockIdx.x != 0) return;
    if (threadIdx.x == 0) sampled(p, row, choice, id);
}

// The end of a step that sampled nothing on the device.
DEV void finish(u32 *flag, const u32 *step) {
    __threadfence_system();
    *(volatile u32 *)flag = *step;
}
