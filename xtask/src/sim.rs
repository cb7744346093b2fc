//! The scheduler under virtual time: many seeds of a world full of faults, what placement is worth, and
//! what a decision costs.
use crate::run::{cargo, check};
use anyhow::{Context as _, Result, bail};

/// `--seeds N`, `--first SEED`.
pub fn run(flags: &[&str]) -> Result<()> {
    let (mut seeds, mut first) = (1000u64, 0u64);
    let mut words = flags.iter();
    while let Some(flag) = words.next() {
        let mut number = || -> Result<u64> {
            let word = words.next().with_context(|| format!("{flag} takes a number"))?;
            word.parse().with_context(|| format!("{flag} {word}"))
        };
        match *flag {
            "--seeds" => seeds = number()?,
            "--first" => first = number()?,
            other => bail!("unknown: {other}; there are --seeds N and --first SEED"),
        }
    }
    for filter in ["world::", "table::"] {
        let mut test =
            cargo(&["test", "--quiet", "--release", "--package", "weir-scheduler", "--test", "suite"]);
        test.arg(filter).args(["--", "--nocapture"]);
        check(test.env("WEIR_SIM_SEEDS", seeds.to_string()).env("WEIR_SIM_FIRST", first.to_string()))?;
    }
    check(&mut cargo(&["bench", "--quiet", "--package", "weir-scheduler", "--bench", "decision"]))
}
