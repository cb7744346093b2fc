//! A kernel's text as it grows, and the pieces that several kernels have.
use super::{Dialect, Kernel};
use std::fmt::Write;

/// A kernel's text as it grows.
pub(super) struct Text {
    pub(super) dialect: Dialect,
    pub(super) text: String,
    pub(super) writes: Vec<bool>,
}

impl Text {
    pub(super) fn new(dialect: Dialect) -> Text {
        let mut text = String::new();
        if dialect.browser && dialect.lanes > 1 {
            text.push_str("enable subgroups;\n");
        }
        _ = writeln!(text, "const SG = {}u;", dialect.lanes);
        text.push_str(include_str!("common.wgsl"));
        Text { dialect, text, writes: Vec::new() }
    }

    pub(super) fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    pub(super) fn add(&mut self, text: &str) {
        self.text.push_str(text);
    }

    pub(super) fn constants(&mut self, constants: &[(&str, usize)]) {
        for (name, value) in constants {
            _ = writeln!(self.text, "const {name} = {value}u;");
        }
    }

    pub(super) fn buffer(&mut self, name: &str, element: &str, written: bool) {
        let access = if written { "read_write" } else { "read" };
        let at = self.writes.len();
        _ = writeln!(self.text, "@group(0) @binding({at}) var<storage, {access}> {name}: array<{element}>;");
        self.writes.push(written);
    }

    pub(super) fn region(&mut self) {
        self.buffer("w4", "vec4<u32>", false);
        self.buffer("w1", "u32", false);
    }

    /// Opens `main`, which knows its workgroup `wg` and its invocation `lid`.
    pub(super) fn main(&mut self) {
        self.line("@compute @workgroup_size(256)\nfn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {");
    }

    pub(super) fn finish(self, entry: &'static str) -> Kernel {
        Kernel { text: self.text, entry, writes: self.writes }
    }
}

/// Adds a value up over `lanes` neighbouring lanes.
pub(super) fn shuffle(name: &str, lanes: usize) -> String {
    let mut t = String::new();
    let mut step = 1;
    while step < lanes {
        _ = writeln!(t, "{name} += subgroupShuffleXor({name}, {step}u);");
        step *= 2;
    }
    t
}

/// The largest of a value over `lanes` neighbouring lanes.
pub(super) fn largest_of(name: &str, lanes: usize) -> String {
    shuffle(name, lanes)
        .replace(&format!("{name} += subgroup"), &format!("{name} = max({name}, subgroup"))
        .replace(");", "));")
}

/// Keeps what lies between `//#if FLAG` and `//#end` only where the flag is set, else what lies behind `//#else`, and
/// writes shuffles out.
pub(super) fn expand(text: &str, flags: &[&str], dialect: Dialect) -> String {
    let mut out = String::with_capacity(text.len());
    let mut keep = true;
    for line in text.lines() {
        let word = line.trim_start();
        if let Some(flag) = word.strip_prefix("//#if ") {
            keep = flags.contains(&flag.trim());
        } else if word.starts_with("//#else") {
            keep = !keep;
        } else if word.starts_with("//#end") {
            keep = true;
        } else if keep {
            if word.starts_with("//#shuffle v SG") {
                out.push_str(&shuffle("v", dialect.lanes as usize));
            } else if !word.starts_with("//") {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

/// A float as WGSL spells it.
pub(super) fn float(value: f32) -> String {
    format!("{value:e}f")
}
