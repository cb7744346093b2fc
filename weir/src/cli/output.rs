//! What people see: tables, progress bars, notes.
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;
use weir_backends::store::Progress;

/// Writes rows in columns; the last column isn't padded.
pub(super) fn table(out: &mut impl Write, rows: &[Vec<String>]) -> io::Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|r| r.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// A line for a person, dimmed; nothing where stderr is not a terminal.
pub(super) fn note(text: &str) {
    if io::stderr().is_terminal() {
        eprintln!("\x1b[2m{text}\x1b[0m");
    }
}

/// Shows a pull: a bar on a terminal, a few lines elsewhere.
pub(super) struct PullBar {
    bar: ProgressBar,
    name: String,
    terminal: bool,
}

impl PullBar {
    pub(super) fn new(name: &str) -> PullBar {
        let bar = ProgressBar::new(0);
        let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        PullBar { bar, name: name.to_owned(), terminal: io::stderr().is_terminal() }
    }

    pub(super) fn show(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Waiting => {
                self.say(&format!("{}: another process is fetching it; waiting", self.name));
            }
            Progress::Checking { done, total } => self.set("Checking", done, total),
            Progress::Trying { source } => {
                self.bar.enable_steady_tick(Duration::from_millis(200));
                self.bar.set_message(format!("Fetching {}", self.name));
                if !self.terminal || tracing::enabled!(tracing::Level::INFO) {
                    self.say(&format!("Fetching {} from {source}", self.name));
                }
            }
            Progress::Bytes { done, total } => self.set("Fetching", done, total),
            Progress::GaveUp { source, error } => self.say(&format!("{source}: {error}")),
        }
    }

    fn set(&self, verb: &str, done: u64, total: u64) {
        if self.bar.length() != Some(total) || self.bar.position() > done {
            // bytes of earlier pulls don't count towards the rate
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.reset_eta();
            self.bar.set_message(format!("{verb} {}", self.name));
        }
        self.bar.set_position(done);
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Takes the bar away.
    pub(super) fn finish(self) {
        self.bar.finish_and_clear();
    }
}
