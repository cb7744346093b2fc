//! The command line. Data goes to stdout, everything else to stderr.
mod bench;
mod chat;
mod devices;
mod ending;
mod join;
mod key;
mod members;
mod models;
mod output;
mod policy;
mod pull;
mod remove;
mod secure;
mod serve;
mod serving;
mod session;
mod speaker;
mod telling;
mod top;
mod trust;
mod usage;

use crate::config::Config;
use crate::driver::{DeviceChoice, DeviceOptions};
use crate::telemetry::{self, LogFormat};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use weir_backends::store::Store;
use weir_node::Machine;

/// Exit codes, besides clap's own 2 for a wrong command line.
const FAILURE: u8 = 1;
const INTERRUPTED: u8 = 130;

/// Run language models on the machines you own.
#[derive(Parser)]
#[command(name = "weir", version, max_term_width = 100, after_help = EXAMPLES)]
struct Arguments {
    /// Read this file instead of ./weir.toml or the user's own
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    config: Option<PathBuf>,
    /// What computes: auto, cpu, cuda, cuda:1, wgpu [default: auto, an NVIDIA GPU if there is one]
    #[arg(long, global = true, value_name = "DEVICE", help_heading = "Global options")]
    device: Option<DeviceChoice>,
    /// Log more to stderr (-v: what happens, -vv: why)
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    verbose: u8,
    /// What log lines look like: text, or a JSON object each
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Global options")]
    log_format: Option<LogFormat>,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  weir chat \"Why is the sky blue?\"       answers; fetches the default model first if need be
  git diff | weir chat \"Review this\"     standard input is added to the prompt
  weir serve                             an OpenAI-compatible gateway on http://127.0.0.1:8484
  weir serve --listen 0.0.0.0:8484       the same, and other machines can join
  weir join LINK                         this machine becomes a node; `weir link` prints the link
  weir pull qwen2.5-coder-0.5b           fetches a model
  weir models                            what can be fetched, and what is here";

#[derive(Subcommand)]
enum Command {
    /// Ask a model: one answer, or a conversation
    Chat(chat::Chat),
    /// Serve models over the OpenAI API
    Serve(serve::Serve),
    /// Make this machine a node of a cluster
    Join(join::Join),
    /// Print a link with which another machine can join
    Link(members::Link),
    /// List the nodes of a running scheduler
    Nodes(members::Nodes),
    /// Watch a running scheduler: nodes, queues, tokens a second, latencies
    Top(top::Top),
    /// Let a machine in that asks to join
    Admit(members::Admit),
    /// Send a node nothing new, and move what runs there
    Drain(members::Drain),
    /// Cut a node off for good
    Revoke(members::Revoke),
    /// API keys: who may ask, for which models, and for how much
    Key(key::Key),
    /// What was asked for, and what it cost
    Usage(usage::Usage),
    /// Check, explain and test routing policies
    Policy(policy::Policy),
    /// Trust the certificate of a scheduler in this network
    Trust(trust::Trust),
    /// Fetch models
    Pull(pull::Pull),
    /// List the models of the catalog, and what of them is on this machine
    Models(models::Models),
    /// Delete fetched models from this machine
    Remove(remove::Remove),
    /// Measure tokens a second, and what share of this machine's memory bandwidth that is
    Bench(bench::Bench),
    /// List what can run models on this machine
    Devices(devices::Devices),
}

/// Why a command ended without doing what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut config = Config::load(arguments.config.as_deref())?;
    config.device = arguments.device.unwrap_or(config.device);
    config.log_format = arguments.log_format.unwrap_or(config.log_format);
    start_logging(&config, arguments.verbose)?;
    ending::end_on_interrupt();
    match arguments.command {
        Command::Chat(command) => command.run(&config),
        Command::Serve(command) => command.run(&config),
        Command::Join(command) => command.run(&config),
        Command::Link(command) => command.run(&config),
        Command::Nodes(command) => command.run(&config),
        Command::Top(command) => command.run(&config),
        Command::Admit(command) => command.run(&config),
        Command::Drain(command) => command.run(&config),
        Command::Revoke(command) => command.run(&config),
        Command::Key(command) => command.run(&config),
        Command::Usage(command) => command.run(&config),
        Command::Policy(command) => command.run(&config),
        Command::Trust(command) => command.run(&config),
        Command::Pull(command) => command.run(&config),
        Command::Models(command) => command.run(&config),
        Command::Remove(command) => command.run(&config),
        Command::Bench(command) => command.run(&config),
        Command::Devices(command) => command.run(&config),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    if error.is::<Interrupted>() {
        return ExitCode::from(INTERRUPTED);
    }
    // whoever read our output has seen enough
    if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", explain(error));
    ExitCode::from(FAILURE)
}

/// An error and its causes, but for those that it tells of itself.
fn explain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.contains(&cause) {
            true => told,
            false if told.is_empty() => cause,
            false => format!("{told}: {cause}"),
        }
    })
}

fn start_logging(config: &Config, verbose: u8) -> anyhow::Result<()> {
    let filter = match verbose {
        0 => &config.log,
        1 => "info",
        _ => "debug",
    };
    let filter =
        tracing_subscriber::EnvFilter::try_new(filter).with_context(|| format!("log = `{filter}`"))?;
    telemetry::start_logging(filter, config.log_format);
    Ok(())
}

fn store(config: &Config) -> anyhow::Result<Store> {
    Ok(Store::new(config.store()?)?)
}

/// This machine as a node tells of it, before it holds anything.
fn machine(config: &Config, device: DeviceOptions) -> anyhow::Result<Machine> {
    let (description, memory) = device.survey()?;
    let bandwidth = bench::memory_bandwidth(config.threads);
    Ok(Machine {
        labels: config.labels(),
        devices: vec![description],
        memory,
        bandwidth,
        price: config.price(),
        ..Machine::default()
    })
}

/// Of the runtime's threads: so much that the chat templates of usual requests are rendered on it. Only what is used is memory.
const STACK_BYTES: usize = 16 << 20;

/// The runtime of a command that does more than one thing at a time. Half of the processors are left to what computes and to
/// the kernel's part of the network; and a request that stays on one thread is answered sooner than one that is handed about.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, 8);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().worker_threads(threads).thread_stack_size(STACK_BYTES);
    builder.build().context("could not start the runtime")
}

/// The runtime of a node, which carries tokens from its engines to one scheduler: one thread, the caller's.
fn single_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("could not start the runtime")
}
