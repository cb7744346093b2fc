// Folds what `attend_span` found of each span, in order: the same operations on the same numbers as in `attend`.
// Generated before it: HD, G, KH, WINDOW, OUT, as there.
@group(0) @binding(0) var<storage, read> partials: array<f32>;
@group(0) @binding(1) var<storage, read> steps: array<u32>;
@group(0) @binding(2) var<storage, read_write> outq: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> outs: array<vec2<u32>>;

var<workgroup> state: array<f32, G * HD>;

fn share(most: f32, now: f32) -> f32 {
    return select(decay(most - now), 1.0, most == now);
}

@compute @workgroup_size(128)
fn merge(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let position = steps[4u * wg.y];
    let first = select(0u, (position + 1u - min(WINDOW, position + 1u)) / 128u, WINDOW != 0u);
    let spans = position / 128u + 1u - first;
    for (var i = lid; i < G * HD; i += 128u) {
        var most = NOTHING;
        var sum = 0.0;
        var value = 0.0;
        for (var z = 0u; z < spans; z++) {
            let at = ((wg.y * P.spans + z) * (G * KH) + wg.x * G + i / HD) * (HD + 2u);
            let now = max(most, partials[at + HD]);
            let keep = share(most, now);
            let take = share(partials[at + HD], now);
            most = now;
            sum = fma(sum, keep, partials[at + HD + 1u] * take);
            value = fma(partials[at + i % HD], take, value * keep);
        }
        state[i] = value / sum;
    }
    workgroupBarrier();
    for (var b = lid; b < G * HD / 32u; b += 128u) {
        let column = wg.x * G * HD + 32u * b;
        var v: array<vec4<f32>, 8>;
        for (var k = 0u; k < 8u; k++) {
            let i = 32u * b + 4u * k;
            v[k] = vec4<f32>(state[i], state[i + 1u], state[i + 2u], state[i + 3u]);
        }
        //#put v wg.y column OUT
    }
}
