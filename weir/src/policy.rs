//! Where the routing policy comes from, and how it follows its file while the program runs.
use crate::driver::Driver;
use anyhow::{Context, anyhow, bail};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use weir_policies::{Rules, SHIPPED, Shipped, shipped};
use weir_scheduler::Clock;

/// How often the file is looked at, and how often the scheduler is told the time.
const LOOK: Duration = Duration::from_secs(1);
const CLOCK: Duration = Duration::from_secs(60);
/// Bytes of a policy file that are read: one that is longer is refused by its parser.
const FILE_MAX: u64 = 1 << 20;

/// Where a policy comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// One that comes with the program.
    Shipped(&'static Shipped),
    /// A file.
    File(PathBuf),
}

impl Source {
    /// A path, or a shipped policy's name where there is no such file.
    pub fn named(name: &str) -> anyhow::Result<Source> {
        let path = Path::new(name);
        match shipped(name) {
            _ if path.is_file() => Ok(Source::File(path.to_owned())),
            Some(policy) => Ok(Source::Shipped(policy)),
            None => {
                let names: Vec<&str> = SHIPPED.iter().map(|policy| policy.name).collect();
                Err(anyhow!("there is no policy file {name}; policies that need none: {}", names.join(", ")))
            }
        }
    }

    /// What it says.
    pub fn text(&self) -> anyhow::Result<String> {
        match self {
            Source::Shipped(policy) => Ok(policy.text.to_owned()),
            Source::File(path) => read(path),
        }
    }

    /// For a person.
    pub fn name(&self) -> String {
        match self {
            Source::Shipped(policy) => policy.name.to_owned(),
            Source::File(path) => path.display().to_string(),
        }
    }

    /// Reads and checks it.
    pub fn load(&self) -> anyhow::Result<Rules> {
        parse(&self.name(), &self.text()?)
    }

    /// Puts the policy in force, and each later version of its file that is right; what is wrong with one is said on
    /// stderr, and the one before stays. Must be called
    /// within a tokio runtime; ends with it.
    pub async fn follow(self, driver: Driver) -> anyhow::Result<()> {
        let mut last = self.text()?;
        enforce(&driver, parse(&self.name(), &last)?).await;
        tokio::spawn(async move {
            let mut look = tokio::time::interval(LOOK);
            loop {
                look.tick().await;
                self.look_again(&driver, &mut last).await;
            }
        });
        Ok(())
    }

    async fn look_again(&self, driver: &Driver, last: &mut String) {
        let Source::File(_) = self else { return };
        let source = self.clone();
        // Editors take files away for a moment when they save.
        let Ok(Ok(text)) = tokio::task::spawn_blocking(move || source.text()).await else { return };
        if text == *last {
            return;
        }
        match parse(&self.name(), &text) {
            Ok(rules) => {
                eprintln!("The policy in {} has changed and holds from now on.", self.name());
                enforce(driver, rules).await;
            }
            Err(error) => eprintln!("error: {error}\nThe policy from before stays in force."),
        }
        *last = text;
    }
}

/// Tells the scheduler the time, for policies that ask and budgets that begin anew; at once, and from then on. Must be
/// called within a tokio runtime; ends with it.
pub async fn keep_time(driver: Driver) {
    driver.set_clock(clock()).await;
    tokio::spawn(async move {
        let mut told = tokio::time::interval(CLOCK);
        loop {
            told.tick().await;
            driver.set_clock(clock()).await;
        }
    });
}

async fn enforce(driver: &Driver, rules: Rules) {
    driver.set_stand_ins(rules.fallback.clone());
    driver.set_policy_allowances(rules.allowances.iter().flat_map(|a| a.limits()).collect()).await;
    driver.set_policy(Box::new(rules)).await;
}

/// Reads a file of bounded length.
pub fn read(path: &Path) -> anyhow::Result<String> {
    let named = || path.display().to_string();
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_MAX).read_to_string(&mut text))
        .with_context(named)?;
    Ok(text)
}

/// Checks a policy's text; each mistake is a line that begins as compilers' do.
pub fn parse(name: &str, text: &str) -> anyhow::Result<Rules> {
    let problems = match Rules::parse(text) {
        Ok(rules) => return Ok(rules),
        Err(problems) => problems.0,
    };
    let lines: Vec<String> =
        problems.iter().map(|p| format!("{name}:{}:{}: {}", p.line, p.column, p.message)).collect();
    bail!("{}", lines.join("\n"))
}

fn clock() -> Clock {
    let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let offset = jiff::Timestamp::from_second(unix_s).map(|now| jiff::tz::TimeZone::system().to_offset(now));
    Clock { unix_s, utc_offset_s: offset.map_or(0, |offset| offset.seconds()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Ask, DriverConfig, ModelSpec};
    use weir_backends::null::NULL_MODEL;

    /// Until a request ends as expected: by the rule of this name, or well.
    async fn wait_for(driver: &Driver, rule: Option<&str>) {
        for _ in 0..100 {
            let came =
                driver.generate(Ask::new(NULL_MODEL, vec![1], 1)).await.err().map(|failure| failure.message);
            match (&came, rule) {
                (None, None) => return,
                (Some(message), Some(rule)) if message.contains(&format!("rule `{rule}`: ")) => return,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        panic!("no request ends by {rule:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_policy_follows_its_file() {
        let config = DriverConfig { models: vec![ModelSpec::null()], ..DriverConfig::default() };
        let driver = Driver::start(config).await.unwrap();
        wait_for(&driver, None).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.toml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        let closed = |name: &str| format!("[[deny]]\nname = '{name}'\nthat = 'true'");
        write(&closed("closed"));
        let source = Source::named(path.to_str().unwrap()).unwrap();
        source.follow(driver.clone()).await.unwrap();
        wait_for(&driver, Some("closed")).await;
        write(&closed("still closed"));
        wait_for(&driver, Some("still closed")).await;
        // What is wrong changes nothing.
        write("[[deny]]\nthat = 'tru'");
        tokio::time::sleep(2 * LOOK).await;
        wait_for(&driver, Some("still closed")).await;
        write("about = 'open'");
        wait_for(&driver, None).await;
    }
}
