// The choice of a token by the rule of sampling.rs: greedy, or Gumbel-max with min_p.
// Generated before it: VOCAB, OUTS (where the list of wanted rows is in steps), PEAKS (workgroups of the head), CHUNKS,
// CHUNK (ids of one).
@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> peaks: array<f32>;
@group(0) @binding(2) var<storage, read> steps: array<u32>;
@group(0) @binding(3) var<storage, read_write> candidates: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read_write> last: array<u32>;
@group(0) @binding(5) var<storage, read_write> ids: array<u32>;

var<workgroup> best_score: array<f32, 256>;
var<workgroup> best_id: array<u32, 256>;

// Both halves of a product of two words: high, low.
fn wide_product(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let bl = b & 0xffffu;
    let bh = b >> 16u;
    let low = al * bl;
    let middle = ah * bl + (low >> 16u);
    let other = al * bh + (middle & 0xffffu);
    return vec2<u32>(ah * bh + (middle >> 16u) + (other >> 16u), a * b);
}

fn philox(first: vec4<u32>, first_key: vec2<u32>) -> vec4<u32> {
    var c = first;
    var key = first_key;
    for (var i = 0u; i < 10u; i++) {
        let a = wide_product(0xD2511F53u, c.x);
        let b = wide_product(0xCD9E8D57u, c.z);
        c = vec4<u32>(b.x ^ c.y ^ key.x, b.y, a.x ^ c.w ^ key.y, a.y);
        key += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    }
    return c;
}

// ln(1 + y) for -1/3 < y < 1/2, by 2 artanh(y / (2 + y)).
fn ln_near_one(y: f32) -> f32 {
    let z = y / (2.0 + y);
    let s = z * z;
    var p = 1.0 / 15.0;
    p = fma(p, s, 1.0 / 13.0);
    p = fma(p, s, 1.0 / 11.0);
    p = fma(p, s, 1.0 / 9.0);
    p = fma(p, s, 1.0 / 7.0);
    p = fma(p, s, 1.0 / 5.0);
    p = fma(p, s, 1.0 / 3.0);
    return 2.0 * fma(z * s, p, z);
}

// ln of a positive, normal number.
fn ln(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    var exponent = i32(bits >> 23u) - 127;
    var mantissa = bitcast<f32>((bits & 0x7fffffu) | 0x3f800000u);
    if mantissa > 1.41421356 {
        mantissa *= 0.5;
        exponent += 1;
    }
    return fma(f32(exponent), 0.69314718, ln_near_one(mantissa - 1.0));
}

// -ln(-ln u), u = ((word >> 8) + 1/2) / 2^24: above 1/2 by what is missing to 1, which f32 still holds.
fn gumbel(word: u32) -> f32 {
    let n = word >> 8u;
    var e: f32;
    if n < 0x800000u {
        e = -ln((f32(n) + 0.5) * (1.0 / 16777216.0));
    } else {
        let v = (f32(0xffffffu - n) + 0.5) * (1.0 / 16777216.0);
        // Near 1/2 the series of 1 - v would be long: there the logarithm itself is exact enough.
        e = select(-ln(1.0 - v), -ln_near_one(-v), v < 0.25);
    }
    return -ln(e);
}

fn clean(logit: f32) -> f32 {
    let is_nan = (bitcast<u32>(logit) & 0x7fffffffu) > 0x7f800000u;
    return select(clamp(logit, -3e38, 1e30), -3e38, is_nan);
}

// Leaves the best of the 256, ties to the lowest id, in place 0.
fn race(score: f32, id: u32, lid: u32) {
    workgroupBarrier();
    best_score[lid] = score;
    best_id[lid] = id;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lid < half {
            let other = best_score[lid + half];
            let other_id = best_id[lid + half];
            if other > best_score[lid] || (other == best_score[lid] && other_id < best_id[lid]) {
                best_score[lid] = other;
                best_id[lid] = other_id;
            }
        }
    }
    workgroupBarrier();
}

// The best of one chunk of the vocabulary. A wanted row is eight words: its place, whether to sample, 1 / temperature (0:
// greedy), the floor of min_p, the seed's two words, the position, the slot.
@compute @workgroup_size(256)
fn choose(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let want = OUTS + 8u * (P.base + wg.y);
    let inverse = bitcast<f32>(steps[want + 2u]);
    let floor = bitcast<f32>(steps[want + 3u]);
    let key = vec2<u32>(steps[want + 4u], steps[want + 5u]);
    var most = -3e38;
    for (var i = lid; i < PEAKS; i += 256u) {
        most = max(most, clean(peaks[wg.y * PEAKS + i]));
    }
    race(most, lid, lid);
    most = best_score[0];
    var score = -3.3e38;
    var best = 0xffffffffu;
    let end = select(0u, min(VOCAB, (wg.x + 1u) * CHUNK), most > -3e38);
    for (var id = wg.x * CHUNK + lid; id < end; id += 256u) {
        let logit = clean(logits[wg.y * VOCAB + id]);
        var s = logit;
        if inverse > 0.0 {
            s = (logit - most) * inverse;
            // The likeliest token's noise is at least -2.87, any other's at most 17.33.
            if s < floor || s < -20.3 {
                continue;
            }
            let words = philox(vec4<u32>(id / 4u, steps[want + 6u], 0u, 0u), key);
            s += gumbel(words[id % 4u]);
        }
        if s > score {
            score = s;
            best = id;
        }
    }
    race(score, best, lid);
    if lid == 0u {
        candidates[wg.y * CHUNKS + wg.x] = vec2<u32>(bitcast<u32>(best_score[0]), best_id[0]);
    }
}

// The best of all chunks, remembered for the slot.
@compute @workgroup_size(256)
fn settle(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let want = OUTS + 8u * (P.base + wg.y);
    var score = -3.3e38;
    var best = 0xffffffffu;
    for (var c = lid; c < CHUNKS; c += 256u) {
        let candidate = candidates[wg.y * CHUNKS + c];
        let s = bitcast<f32>(candidate.x);
        if s > score || (s == score && candidate.y < best) {
            score = s;
            best = candidate.y;
        }
    }
    race(score, best, lid);
    if lid == 0u && steps[want + 1u] != 0u {
        let id = select(best_id[0], 0u, best_id[0] == 0xffffffffu || best_score[0] <= -3e38);
        ids[P.base + wg.y] = id;
        last[steps[want + 7u]] = id;
    }
}
