//! Random policy files.
use crate::random::{Kind, Rng, expression};

/// A policy of random rules, beside `fixed`.
pub(crate) fn policy(rng: &mut Rng, fixed: &str) -> String {
    let mut text = String::new();
    let weight = |rng: &mut Rng| rng.below(2000) as f64 / 10.0;
    text += &format!("on_loss = '{}'\n", rng.of(&["resume", "restart", "fail"]));
    let (latency, cost) = (weight(rng), weight(rng));
    text += &format!("[objective]\nlatency = {latency}\ncost = {cost}\nquality = {}\n", weight(rng));
    if !rng.one_in(3) {
        let when = if rng.one_in(3) { "true".into() } else { expression(rng, Kind::Bool, 2, false) };
        text += &format!("[spill]\nwhen = \"{when}\"\n");
    }
    for _ in 0..rng.below(4) {
        let kind = rng.of(&["require", "deny", "prefer", "prefer"]);
        text += &format!("[[{kind}]]\nthat = \"{}\"\n", expression(rng, Kind::Bool, 2, true));
        if rng.one_in(2) {
            text += &format!("when = \"{}\"\n", expression(rng, Kind::Bool, 2, false));
        }
        if kind == "prefer" {
            text += &format!("weight = {}\n", weight(rng));
        }
    }
    for _ in 0..rng.below(2) {
        let spill = rng.one_in(2);
        let when = expression(rng, Kind::Bool, 2, false);
        text += &format!(
            "[[override]]\nwhen = \"{when}\"\nset = {{ latency = {}, spill = {spill} }}\n",
            weight(rng)
        );
    }
    text + fixed
}
