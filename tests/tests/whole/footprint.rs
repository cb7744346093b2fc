//! What answering costs a machine: memory, and time from the start of the process to the first token.
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};
use weir_backends::gguf::ModelFile;
use weir_backends::load::{LoadOptions, kv_layout};
use weir_backends::models;
use weir_scheduler::BLOCK_TOKENS;
use weir_tests::{model, weir};

/// Peak resident memory is at most the file 1.3 times, the KV cache and 150 MB; the first token comes in `time` in a
/// release build, with a warm page cache and the file's digest known.
fn check(file: &str, time: Duration) {
    let Some(path) = model(file) else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let start = Instant::now();
        let mut command = weir(folder.path());
        command.args(["chat", "--max-tokens", "2", "--model"]).arg(&path).arg("Why is the sky blue?");
        command.env("WEIR_CACHE", folder.path().join("cache"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut first = [0];
        let read = child.stdout.as_mut().unwrap().read(&mut first).unwrap();
        let (took, peak) = (start.elapsed(), peak_bytes(child.id()));
        assert!(child.wait().unwrap().success());
        assert_eq!(read, 1, "{file}: it said nothing");
        (took, peak)
    };
    let runs: Vec<_> = (0..3).map(|_| run()).collect();
    let fastest = runs.iter().map(|run| run.0).min().unwrap();
    let opened = ModelFile::open(&path).unwrap();
    let plan = models::plan(&opened).unwrap();
    let blocks = kv_layout(&opened, &plan, LoadOptions::default(), u64::MAX).0.blocks as usize;
    let per_token = plan.kv_bytes_per_token(0..plan.layers.len(), LoadOptions::default().kv);
    let kv = (blocks * BLOCK_TOKENS * per_token) as u64;
    let most = opened.total_bytes() * 13 / 10 + kv + 150_000_000;
    let Some(peak) = runs.iter().filter_map(|run| run.1).max() else {
        eprintln!("SKIPPED: this system doesn't say how much memory a process had");
        return;
    };
    println!(
        "{file}: peak {} MB of at most {} (the KV cache's {} MB are touched as they fill), first token after {fastest:.0?}",
        peak / 1_000_000,
        most / 1_000_000,
        kv / 1_000_000
    );
    assert!(peak <= most, "{file}: {peak} bytes resident, at most {most} may be");
    assert!(peak <= most - kv / 2, "{file}: {peak} bytes resident although the KV cache is all but empty");
    if !cfg!(debug_assertions) {
        assert!(fastest <= time, "{file}: the first token came after {fastest:?}, it may take {time:?}");
    }
}

/// `VmHWM` of a process that still runs.
fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[test]
fn models_are_light() {
    check("smollm2.gguf", Duration::from_millis(500));
    check("gemma3.gguf", Duration::from_millis(1500));
    check("qwen2.gguf", Duration::from_millis(1500));
}
