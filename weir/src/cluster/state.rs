//! The cluster's part of what is on disk.
use super::{Record, Token};
use crate::state::{State, StateError, Table};
use redb::{ReadableDatabase, TableDefinition};
use std::collections::BTreeMap;
use weir_transport::PublicKey;

const KEY: Table<&str> = TableDefinition::new("key");
const NODES: Table<&[u8; 32]> = TableDefinition::new("nodes");
const TOKENS: Table<&[u8; 32]> = TableDefinition::new("tokens");
/// The cluster's secret key in [`KEY`].
const CLUSTER: &str = "cluster";

/// Tables of the cluster's.
#[derive(Debug)]
pub(super) struct Tables(pub State);

impl Tables {
    pub fn key(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.0.told(|| {
            let table = match self.0.database().begin_read()?.open_table(KEY) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            Ok(table.get(CLUSTER)?.map(|value| value.value().to_vec()))
        })
    }

    pub fn set_key(&self, pkcs8: &[u8]) -> Result<(), StateError> {
        self.0.told(|| {
            let write = self.0.database().begin_write()?;
            write.open_table(KEY)?.insert(CLUSTER, pkcs8)?;
            Ok(write.commit()?)
        })
    }

    pub fn nodes(&self) -> Result<BTreeMap<PublicKey, Record>, StateError> {
        Ok(self.0.all(NODES, |key| PublicKey(*key))?.into_iter().collect())
    }

    pub fn set_node(&self, key: &PublicKey, record: &Record) -> Result<(), StateError> {
        self.0.set(NODES, &key.0, Some(record))
    }

    pub fn tokens(&self) -> Result<BTreeMap<[u8; 32], Token>, StateError> {
        Ok(self.0.all(TOKENS, |digest| *digest)?.into_iter().collect())
    }

    pub fn set_token(&self, digest: &[u8; 32], token: Option<&Token>) -> Result<(), StateError> {
        self.0.set(TOKENS, digest, token)
    }
}
