// Rows of the embedding's table into the residual stream.
// Generated before it: HID, SCALE, FIRST and COUNT (rows of this part), NOT_HERE, the bindings w4, w1, and `value8`, which
// gives eight columns.
@group(0) @binding(2) var<storage, read> steps: array<u32>;
@group(0) @binding(3) var<storage, read> last: array<u32>;
@group(0) @binding(4) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = wg.y;
    var id = steps[4u * row + 2u];
    if id == 0xffffffffu {
        id = last[steps[4u * row + 3u]];
    }
    if id < FIRST || id >= FIRST + COUNT {
        return;
    }
    for (var c = lid; 8u * c < HID; c += 64u) {
        let v = value8(id - FIRST, c);
        for (var i = 0u; i < min(8u, HID - 8u * c); i++) {
            x[row * HID + 8u * c + i] = v[i] * SCALE;
        }
    }
}
