//! The cluster's state on disk: one redb file.
use super::{ClusterError, Record, Token};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use weir_transport::PublicKey;

const KEY: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("key");
const NODES: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("nodes");
const TOKENS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("tokens");
/// The cluster's secret key in [`KEY`].
const CLUSTER: &str = "cluster";

/// The file, open; nobody else can open it meanwhile.
#[derive(Debug)]
pub(super) struct State {
    database: Database,
    path: PathBuf,
}

type Tried<T> = Result<T, redb::Error>;

impl State {
    /// Makes the folder and the file if need be; only their owner can read them.
    pub fn open(folder: &Path) -> Result<State, ClusterError> {
        let path = folder.join("cluster.redb");
        let failed = |why: String| ClusterError::State { path: path.clone(), why };
        crate::private::create_folder(folder).map_err(|e| failed(e.to_string()))?;
        let file = crate::private::open_file(&path).map_err(|e| failed(e.to_string()))?;
        drop(file);
        let database = Database::create(&path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => failed(
                "another `weir serve` uses this state; stop that, or choose another folder with --state"
                    .into(),
            ),
            other => failed(other.to_string()),
        })?;
        let state = State { database, path };
        state.told(|| {
            let write = state.database.begin_write()?;
            write.open_table(KEY)?;
            write.open_table(NODES)?;
            write.open_table(TOKENS)?;
            Ok(write.commit()?)
        })?;
        Ok(state)
    }

    fn told<T>(&self, try_it: impl FnOnce() -> Tried<T>) -> Result<T, ClusterError> {
        try_it().map_err(|error| ClusterError::State { path: self.path.clone(), why: error.to_string() })
    }

    pub fn key(&self) -> Result<Option<Vec<u8>>, ClusterError> {
        self.told(|| {
            let table = self.database.begin_read()?.open_table(KEY)?;
            Ok(table.get(CLUSTER)?.map(|value| value.value().to_vec()))
        })
    }

    pub fn set_key(&self, pkcs8: &[u8]) -> Result<(), ClusterError> {
        self.told(|| {
            let write = self.database.begin_write()?;
            write.open_table(KEY)?.insert(CLUSTER, pkcs8)?;
            Ok(write.commit()?)
        })
    }

    pub fn nodes(&self) -> Result<BTreeMap<PublicKey, Record>, ClusterError> {
        Ok(self.all(NODES)?.into_iter().map(|(key, record)| (PublicKey(key), record)).collect())
    }

    pub fn set_node(&self, key: &PublicKey, record: &Record) -> Result<(), ClusterError> {
        self.set(NODES, &key.0, Some(record))
    }

    pub fn tokens(&self) -> Result<BTreeMap<[u8; 32], Token>, ClusterError> {
        Ok(self.all(TOKENS)?.into_iter().collect())
    }

    pub fn set_token(&self, digest: &[u8; 32], token: Option<&Token>) -> Result<(), ClusterError> {
        self.set(TOKENS, digest, token)
    }

    fn set<T: serde::Serialize>(
        &self,
        table: TableDefinition<'_, &'static [u8; 32], &'static [u8]>,
        key: &[u8; 32],
        value: Option<&T>,
    ) -> Result<(), ClusterError> {
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

    /// Entries that a later program wrote in another way are passed over, and said so.
    fn all<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'_, &'static [u8; 32], &'static [u8]>,
    ) -> Result<Vec<([u8; 32], T)>, ClusterError> {
        self.told(|| {
            let table = self.database.begin_read()?.open_table(table)?;
            let mut all = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                match serde_json::from_slice(value.value()) {
                    Ok(read) => all.push((*key.value(), read)),
                    Err(error) => tracing::warn!("{}: an entry can't be read: {error}", self.path.display()),
                }
            }
            Ok(all)
        })
    }
}
