//! The project's chores: `cargo xtask test`, `bench cpu`, `golden`, `sim`, `fuzz`.
#![forbid(unsafe_code)]

mod deny;
mod deploy;
mod fuzz;
mod gateway;
mod models;
mod peers;
mod run;
mod sim;
mod telemetry;
mod test;
mod web;

use anyhow::{Result, bail};
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask test [--full]         format, lints, docs, licences, tests, SDK tests, 60 s of fuzzing
                                  --full: golden logits on every instruction set and on the reference device, for all models;
                                  `deploy` and `telemetry`, too
cargo xtask bench cpu [FLAGS]     side by side with llama.cpp on the same files and threads; FLAGS: see --help
cargo xtask test --gpu cuda       the device's tests on this machine's NVIDIA GPU
cargo xtask test --gpu wgpu       the device's tests on this machine's fastest GPU (WEIR_TEST_GPU: part of another's name)
cargo xtask bench cuda [MODEL...] decoding, batches and prefilling of the usual shapes, or of a .gguf
cargo xtask bench wgpu [FLAGS]    decoding and prefilling on a GPU, beside its bandwidth; FLAGS: see --help
cargo xtask bench speculation     what guessing the next tokens is worth, on any device; FLAGS: see --help
cargo xtask bench gateway         what a request's way through the gateway costs, beside smg; FLAGS: see --help
cargo xtask bench spill           what a request costs that is sent on to a provider, beside litellm and portkey; FLAGS: see --help
cargo xtask golden                makes the golden logits again (needs cmake and libclang, as `bench cpu` does)
cargo xtask sim [--seeds N]       the scheduler under virtual time: N seeds of faults, placement and what it costs
cargo xtask telemetry             a real Prometheus and Phoenix look at a cluster: every panel, alert and span
cargo xtask deploy                writes the dashboards, checks the chart, the compose file, units and alert rules
cargo xtask web                   the browser's engine and SDK, in web/dist, and the gateway's pages, in web/site
cargo xtask web test [--full]     the same, and its tests in Chromium
                                  --full: a Tauri program, an Electron example's types, pictures of all pages
cargo xtask fuzz [TARGET] [SECONDS] fuzzes what reads model files (reader), frames, policies, providers' streams (streams)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["test"] => test::run(test::Scope::Default),
        ["test", "--full"] => test::run(test::Scope::Full),
        ["test", "--gpu", device] => test::run_gpu(device),
        ["bench", "cuda", rest @ ..] => peers::bench_plain("cuda", rest),
        ["bench", "wgpu", rest @ ..] => peers::bench_plain("wgpu", rest),
        ["bench", "speculation", rest @ ..] => peers::bench_plain("speculation", rest),
        ["bench", "gateway", rest @ ..] => gateway::bench(rest),
        ["bench", "spill", rest @ ..] => gateway::bench_spill(rest),
        ["bench", "cpu", rest @ ..] => peers::bench_cpu(rest),
        ["golden"] => peers::golden(),
        ["telemetry"] => telemetry::run(),
        ["deploy"] => deploy::run(),
        ["web"] => web::build(),
        ["web", "test"] => web::test(web::Scope::Default),
        ["web", "test", "--full"] => web::test(web::Scope::Full),
        ["sim", rest @ ..] => sim::run(rest),
        ["fuzz"] => fuzz::run(None, 60),
        ["fuzz", target] if target.parse::<u32>().is_err() => fuzz::run(Some(target), 60),
        ["fuzz", seconds] => fuzz::run(None, seconds.parse()?),
        ["fuzz", target, seconds] => fuzz::run(Some(target), seconds.parse()?),
        [] | ["help" | "--help" | "-h"] => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("unknown: {}\n{HELP}", other.join(" ")),
    }
}
