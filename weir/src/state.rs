//! What a scheduler remembers on disk: one redb file in its state folder, which one process at a time has open. Who belongs
//! to the cluster, API keys and what they have spent are tables of it.
use crate::etcd::EtcdError;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata as _, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Secrets and names, as bytes.
pub(crate) const KEY: Table<&str> = TableDefinition::new("key");
/// In [`KEY`]: what this scheduler is called among others.
const REPLICA: &str = "replica";

/// The file, open; nobody else can open it meanwhile. Cheap to clone.
#[derive(Clone, Debug)]
pub struct State {
    database: Arc<Database>,
    path: Arc<Path>,
}

/// Why the state can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct StateError {
    /// The file.
    pub path: PathBuf,
    /// What the system or the database says, and what to try.
    pub why: String,
    /// Another process has it open.
    pub in_use: bool,
}

/// Why something can't be kept or looked up, wherever that is.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// On this machine.
    #[error(transparent)]
    State(#[from] StateError),
    /// Where schedulers share it.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

/// What is tried with the database.
pub(crate) type Tried<T> = Result<T, redb::Error>;

/// A table of JSON by a key.
pub(crate) type Table<K> = TableDefinition<'static, K, &'static [u8]>;

impl State {
    /// Makes the folder and the file if need be; only their owner can read them.
    pub fn open(folder: &Path) -> Result<State, StateError> {
        let path = folder.join("cluster.redb");
        let failed = |why: String| StateError { path: path.clone(), why, in_use: false };
        crate::private::create_folder(folder).map_err(|e| failed(e.to_string()))?;
        let file = crate::private::open_file(&path).map_err(|e| failed(e.to_string()))?;
        drop(file);
        let database = Database::create(&path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                let why =
                    "another `weir serve` uses this state; stop that, or choose another folder with --state";
                StateError { in_use: true, ..failed(why.into()) }
            }
            other => failed(other.to_string()),
        })?;
        Ok(State { database: Arc::new(database), path: path.into() })
    }

    /// The state in this folder, if there ever was one.
    pub fn find(folder: &Path) -> Result<Option<State>, StateError> {
        match folder.join("cluster.redb").is_file() {
            true => State::open(folder).map(Some),
            false => Ok(None),
        }
    }

    /// What this scheduler is called among others: made once.
    pub(crate) fn replica(&self) -> Result<String, StateError> {
        let known = self.told(|| {
            let table = match self.database.begin_read()?.open_table(KEY) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            Ok(table.get(REPLICA)?.map(|value| String::from_utf8_lossy(value.value()).into_owned()))
        })?;
        if let Some(known) = known {
            return Ok(known);
        }
        let mut random = [0; 8];
        rustls::crypto::ring::default_provider().secure_random.fill(&mut random).map_err(|_| StateError {
            path: self.path.to_path_buf(),
            why: "the system has no randomness".into(),
            in_use: false,
        })?;
        let name: String = random.iter().map(|b| format!("{b:02x}")).collect();
        self.told(|| {
            let write = self.database.begin_write()?;
            write.open_table(KEY)?.insert(REPLICA, name.as_bytes())?;
            Ok(write.commit()?)
        })?;
        Ok(name)
    }

    pub(crate) fn database(&self) -> &Database {
        &self.database
    }

    /// Names the file in what goes wrong.
    pub(crate) fn told<T>(&self, try_it: impl FnOnce() -> Tried<T>) -> Result<T, StateError> {
        let failed = |error: redb::Error| StateError {
            path: self.path.to_path_buf(),
            why: error.to_string(),
            in_use: false,
        };
        try_it().map_err(failed)
    }

    /// Puts an entry in the place of the one before it, or takes that out. Blocks until it is on disk.
    pub(crate) fn set<'k, K, T>(
        &self,
        table: Table<K>,
        key: impl std::borrow::Borrow<K::SelfType<'k>>,
        value: Option<&T>,
    ) -> Result<(), StateError>
    where
        K: redb::Key + 'static,
        T: Serialize,
    {
        self.told(|| {
            let write = self.database.begin_write()?;
            {
                let mut table = write.open_table(table)?;
                match value {
                    Some(value) => {
                        let json = serde_json::to_vec(value).expect("strings and numbers always serialise");
                        table.insert(key, json.as_slice())?;
                    }
                    None => _ = table.remove(key)?,
                }
            }
            Ok(write.commit()?)
        })
    }

    /// How many entries a table has, those that can't be read included.
    pub(crate) fn count<K: redb::Key + 'static>(&self, table: Table<K>) -> Result<u64, StateError> {
        self.told(|| match self.database.begin_read()?.open_table(table) {
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(0),
            table => Ok(table?.len()?),
        })
    }

    /// All entries of a table, which is empty if it isn't there. Those that a later program wrote in another way are passed
    /// over, and said so.
    pub(crate) fn all<K, T, O>(
        &self,
        table: Table<K>,
        own: impl Fn(K::SelfType<'_>) -> O,
    ) -> Result<Vec<(O, T)>, StateError>
    where
        K: redb::Key + 'static,
        T: DeserializeOwned,
    {
        self.told(|| {
            let table = match self.database.begin_read()?.open_table(table) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let mut all = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                match serde_json::from_slice(value.value()) {
                    Ok(read) => all.push((own(key.value()), read)),
                    Err(error) => tracing::warn!("{}: an entry can't be read: {error}", self.path.display()),
                }
            }
            Ok(all)
        })
    }
}
