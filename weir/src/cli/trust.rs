//! `weir trust`
use crate::authority::Authority;
use crate::config::{Config, environment};
use anyhow::{Context, bail};
use std::io::{BufRead, IsTerminal, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Trust a scheduler's local authority on this machine, or explain how
#[derive(clap::Args)]
#[command(after_help = "\
A gateway that other machines can reach speaks TLS. Unless it has a certificate of its own (--tls-cert), a local authority
vouches for it, which browsers and SDKs must be told to trust, once a machine. That authority can only vouch for private
addresses and local names: whoever stole its key could not pretend to be anything on the internet.

Without --yes nothing is changed where nobody can be asked: the commands go to standard output.

Examples:
  weir trust                             on the scheduler's machine
  weir trust --pem > weir.pem            to be carried to another machine, and there:
  weir trust weir.pem
  weir trust --remove")]
pub(super) struct Trust {
    /// The authority's certificate, from another machine [default: this machine's own]
    file: Option<PathBuf>,
    /// Print the certificate, and do nothing else
    #[arg(long, conflicts_with_all = ["remove", "yes"])]
    pem: bool,
    /// Trust it no longer
    #[arg(long)]
    remove: bool,
    /// Don't ask
    #[arg(long)]
    yes: bool,
    /// The scheduler's state folder
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Something to do, and for whom.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    what: String,
    commands: Vec<Vec<String>>,
}

/// Where this system keeps what it trusts.
#[derive(Debug, Default)]
struct Stores {
    /// A folder for certificates, and the command that takes them in.
    system: Option<(PathBuf, Vec<&'static str>)>,
    /// Databases of browsers (NSS).
    browsers: Vec<PathBuf>,
    /// NSS's tool is installed.
    certutil: bool,
    /// We may write where the system keeps its certificates.
    root: bool,
}

impl Trust {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<()> {
        let file = match self.file {
            Some(file) => file,
            None => Authority::file(&super::serving::folder(config, self.state.as_deref())?),
        };
        let pem = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "{}: there is no local authority yet; `weir serve --http 0.0.0.0:8484` makes one",
                file.display()
            )
        })?;
        if self.pem {
            stdout().write_all(pem.as_bytes())?;
            return Ok(());
        }
        if !pem.contains("BEGIN CERTIFICATE") {
            bail!("{}: this is no certificate in PEM", file.display());
        }
        let file = std::fs::canonicalize(&file)?;
        // The system's tools take any file of that name for this authority.
        let name = format!("weir-{}", &blake3::hash(pem.trim().as_bytes()).to_hex()[..8]);
        let steps = steps(&stores(), &file, &name, self.remove);
        explain(&file, &steps, self.remove);
        if !(self.yes || asked()?) {
            for command in steps.iter().flat_map(|step| &step.commands) {
                writeln!(stdout(), "{}", shown(command))?;
            }
            return Ok(());
        }
        for step in &steps {
            step.commands.iter().try_for_each(|command| execute(command)).context(step.what.clone())?;
        }
        eprintln!(
            "{}. Browsers that are open notice when they are started again.",
            if self.remove { "Done" } else { "Trusted" }
        );
        Ok(())
    }
}

fn explain(file: &Path, steps: &[Step], remove: bool) {
    eprintln!(
        "The local authority of {} vouches for private addresses and local names only.",
        file.display()
    );
    eprintln!("{} here means:", if remove { "To trust it no longer" } else { "To trust it" });
    for step in steps {
        eprintln!("  {}:", step.what);
        step.commands.iter().for_each(|command| eprintln!("    {}", shown(command)));
    }
}

fn asked() -> anyhow::Result<bool> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(false);
    }
    eprint!("Do that? [y/N] ");
    stderr().flush()?;
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

fn execute(command: &[String]) -> anyhow::Result<()> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).status();
    match status.with_context(|| shown(command))? {
        status if status.success() => Ok(()),
        status => bail!("{} failed ({status})", shown(command)),
    }
}

/// As one would type it.
fn shown(command: &[String]) -> String {
    let quoted =
        |word: &String| match word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,~".contains(c)) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        };
    command.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// What this machine has.
fn stores() -> Stores {
    let systems: [(&str, &[&str]); 3] = [
        ("/usr/local/share/ca-certificates", &["update-ca-certificates"]),
        ("/etc/pki/ca-trust/source/anchors", &["update-ca-trust"]),
        ("/etc/ca-certificates/trust-source/anchors", &["trust", "extract-compat"]),
    ];
    let system = systems.into_iter().find(|(folder, _)| Path::new(folder).is_dir());
    let home = environment("HOME").map(PathBuf::from).unwrap_or_default();
    let profiles = |folder: &str| std::fs::read_dir(home.join(folder)).into_iter().flatten().flatten();
    let firefox = profiles(".mozilla/firefox").chain(profiles("snap/firefox/common/.mozilla/firefox"));
    let all = firefox.map(|entry| entry.path()).chain([home.join(".pki/nssdb")]);
    Stores {
        system: system.map(|(folder, update)| (folder.into(), update.to_vec())),
        browsers: all.filter(|folder| folder.join("cert9.db").is_file()).collect(),
        certutil: works("certutil"),
        root: is_root(),
    }
}

fn works(program: &str) -> bool {
    Command::new(program).arg("-H").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

#[cfg(unix)]
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

fn steps(stores: &Stores, file: &Path, name: &str, remove: bool) -> Vec<Step> {
    match std::env::consts::OS {
        "macos" => vec![step("the system's keychain", vec![mac(file, remove)])],
        "windows" => vec![step("the user's store", vec![windows(file, name, remove)])],
        _ => linux(stores, file, name, remove),
    }
}

fn step(what: &str, commands: Vec<Vec<String>>) -> Step {
    Step { what: what.to_owned(), commands }
}

fn words(all: &[&str]) -> Vec<String> {
    all.iter().map(|word| (*word).to_owned()).collect()
}

fn mac(file: &Path, remove: bool) -> Vec<String> {
    let file = file.display().to_string();
    let keychain = "/Library/Keychains/System.keychain";
    match remove {
        false => {
            words(&["sudo", "security", "add-trusted-cert", "-d", "-r", "trustRoot", "-k", keychain, &file])
        }
        true => words(&["sudo", "security", "remove-trusted-cert", "-d", &file]),
    }
}

fn windows(file: &Path, name: &str, remove: bool) -> Vec<String> {
    match remove {
        false => words(&["certutil", "-user", "-addstore", "Root", &file.display().to_string()]),
        true => words(&["certutil", "-user", "-delstore", "Root", name]),
    }
}

fn linux(stores: &Stores, file: &Path, name: &str, remove: bool) -> Vec<Step> {
    let as_root = |command: &[&str]| match stores.root {
        true => words(command),
        false => words(&[&["sudo"], command].concat()),
    };
    let mut steps = Vec::new();
    let from = file.display().to_string();
    if let Some((folder, update)) = &stores.system {
        let to = folder.join(format!("{name}.crt")).display().to_string();
        let change = match remove {
            false => as_root(&["install", "-m", "644", &from, &to]),
            true => as_root(&["rm", "-f", &to]),
        };
        steps.push(step("the system's store (curl, Python, most programs)", vec![change, as_root(update)]));
    }
    if !stores.browsers.is_empty() && !stores.certutil {
        let tool = "certutil, which browsers' stores need (Debian: libnss3-tools, Fedora: nss-tools)";
        steps.push(step(tool, vec![as_root(&["apt-get", "install", "-y", "libnss3-tools"])]));
    }
    for database in &stores.browsers {
        let at = format!("sql:{}", database.display());
        let command = match remove {
            false => words(&["certutil", "-A", "-d", &at, "-t", "C,,", "-n", name, "-i", &from]),
            true => words(&["certutil", "-D", "-d", &at, "-n", name]),
        };
        steps.push(step("a browser's store", vec![command]));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The commands, line by line.
    fn check(stores: &Stores, remove: bool, expected: &[&str]) {
        let steps = linux(stores, Path::new("/x/authority.pem"), "weir-1", remove);
        let lines: Vec<String> = steps.iter().flat_map(|s| &s.commands).map(|c| shown(c)).collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn what_is_done_depends_on_what_there_is() {
        check(&Stores::default(), false, &[]);
        let debian = Stores {
            system: Some(("/usr/local/share/ca-certificates".into(), vec!["update-ca-certificates"])),
            browsers: vec!["/home/a b/.pki/nssdb".into()],
            certutil: true,
            root: false,
        };
        let crt = "/usr/local/share/ca-certificates/weir-1.crt";
        check(
            &debian,
            false,
            &[
                &format!("sudo install -m 644 /x/authority.pem {crt}"),
                "sudo update-ca-certificates",
                "certutil -A -d 'sql:/home/a b/.pki/nssdb' -t C,, -n weir-1 -i /x/authority.pem",
            ],
        );
        let root = Stores { root: true, ..debian };
        let removed = [
            &format!("rm -f {crt}"),
            "update-ca-certificates",
            "certutil -D -d 'sql:/home/a b/.pki/nssdb' -n weir-1",
        ];
        check(&root, true, &removed);
        let without = Stores { certutil: false, system: None, ..root };
        let steps = linux(&without, Path::new("/x"), "n", false);
        assert!(steps[0].what.contains("libnss3-tools") && steps.len() == 2);
    }
}
