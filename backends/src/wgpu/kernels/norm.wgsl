// One row of the residual stream: what earlier steps left to be added, moments, normalised values.
// Generated before it: HID, the bindings x and w4.
var<workgroup> sums: array<f32, 256>;
var<workgroup> sums2: array<f32, 16>;

// The sum over all 256 invocations, in one fixed order.
fn workgroup_sum(value: f32, lid: u32) -> f32 {
    var v = value;
    //#shuffle v SG
    workgroupBarrier();
    if lid % SG == 0u {
        sums[lid / SG] = v;
    }
    workgroupBarrier();
    var total = 0.0;
    //#if FEW
    for (var i = 0u; i < 256u / SG; i++) {
        total += sums[i];
    }
    //#else
    if lid < 16u {
        var part = 0.0;
        for (var i = 0u; i < 16u / SG; i++) {
            part += sums[lid * (16u / SG) + i];
        }
        sums2[lid] = part;
    }
    workgroupBarrier();
    for (var i = 0u; i < 16u; i++) {
        total += sums2[i];
    }
    //#end
    return total;
}

// Vectors begin at whole vec4.
fn vector4(at: u32, w: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(w4[at / 4u + w]);
}

fn square4(v: vec4<f32>, s: f32) -> f32 {
    return fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, s))));
}
