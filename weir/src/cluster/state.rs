//! Where the cluster's part is kept: on the disk of one scheduler, or in etcd by several.
//!
//! In etcd, what may be changed by several at a time is changed by transactions: a token's uses are counted down once each,
//! and nobody overwrites what another has decided of a node. Etcd has the cluster's secret key then, and whoever can read it
//! there can pass for the cluster: it should be etcd's own machines and the schedulers only.
use super::{Record, Token};
use crate::etcd::{Etcd, EtcdError, Op};
use crate::state::{KEY, KeptError, State, StateError, Table};
use redb::{ReadableDatabase, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use weir_transport::PublicKey;

const NODES: Table<&[u8; 32]> = TableDefinition::new("nodes");
const TOKENS: Table<&[u8; 32]> = TableDefinition::new("tokens");
/// The cluster's secret key in [`KEY`].
const CLUSTER: &str = "cluster";
/// The same in etcd, and what begins the keys of nodes and tokens there.
const SHARED_KEY: &str = "shared/identity";
pub(super) const SHARED_NODES: &str = "shared/nodes/";
pub(super) const SHARED_TOKENS: &str = "shared/tokens/";
/// Times that a transaction is tried which others were quicker than.
const TRIES: u32 = 20;

/// Tables of the cluster's.
#[derive(Debug)]
pub(super) struct Tables {
    pub state: State,
    /// With whom they are shared: then the state has only the key, to know the cluster again.
    pub etcd: Option<Etcd>,
}

impl Tables {
    fn own_key(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.state.told(|| {
            let table = match self.state.database().begin_read()?.open_table(KEY) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            Ok(table.get(CLUSTER)?.map(|value| value.value().to_vec()))
        })
    }

    fn set_own_key(&self, pkcs8: &[u8]) -> Result<(), StateError> {
        self.state.told(|| {
            let write = self.state.database().begin_write()?;
            write.open_table(KEY)?.insert(CLUSTER, pkcs8)?;
            Ok(write.commit()?)
        })
    }

    /// The cluster's secret key; `new` where there is none yet.
    pub fn key(&self, new: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, KeptError> {
        let own = self.own_key()?;
        let Some(etcd) = &self.etcd else {
            return match own {
                Some(own) => Ok(own),
                None => {
                    let new = new();
                    self.set_own_key(&new)?;
                    Ok(new)
                }
            };
        };
        let offered = own.clone().unwrap_or_else(new);
        let put = Op::Put { key: SHARED_KEY.into(), value: offered.clone(), lease: None };
        let done = etcd.transact(&[(SHARED_KEY, 0)], &[put], &[Op::Get(SHARED_KEY.into())])?;
        let key = match done.found.into_iter().next().flatten() {
            Some(found) => found.value,
            None => {
                self.found(etcd)?;
                offered
            }
        };
        match own {
            Some(own) if own != key => {
                let why = "the state folder is of another cluster than etcd; use another folder with --state, or \
                           another --etcd-prefix";
                Err(EtcdError::Config(why.into()).into())
            }
            Some(_) => Ok(key),
            None => {
                self.set_own_key(&key)?;
                Ok(key)
            }
        }
    }

    /// The first scheduler brings its nodes along.
    fn found(&self, etcd: &Etcd) -> Result<(), KeptError> {
        for (key, record) in self.state.all::<_, Record, _>(NODES, |key| PublicKey(*key))? {
            let name = format!("{SHARED_NODES}{key}");
            let put = Op::Put { key: name.clone(), value: json(&record), lease: None };
            etcd.transact(&[(&name, 0)], &[put], &[])?;
        }
        Ok(())
    }

    pub fn nodes(&self) -> Result<BTreeMap<PublicKey, Record>, KeptError> {
        let Some(etcd) = &self.etcd else {
            return Ok(self.state.all(NODES, |key| PublicKey(*key))?.into_iter().collect());
        };
        let all = etcd.list(SHARED_NODES, 0)?.0;
        Ok(all.iter().filter_map(|found| node(&found.key, &found.value)).collect())
    }

    /// A node that another scheduler may have let in just now.
    pub fn find_node(&self, key: &PublicKey) -> Result<Option<Record>, KeptError> {
        let Some(etcd) = &self.etcd else { return Ok(None) };
        let found = etcd.get(&format!("{SHARED_NODES}{key}"))?;
        Ok(found.and_then(|found| read(&found.key, &found.value)))
    }

    /// A node that is new.
    pub fn add_node(&self, key: &PublicKey, record: &Record) -> Result<(), KeptError> {
        match &self.etcd {
            None => Ok(self.state.set(NODES, &key.0, Some(record))?),
            Some(etcd) => put(etcd, format!("{SHARED_NODES}{key}"), record),
        }
    }

    /// Changes what is known of a node; returns how it is then.
    pub fn change_node(
        &self,
        key: &PublicKey,
        known: &Record,
        how: impl Fn(&mut Record),
    ) -> Result<Record, KeptError> {
        let Some(etcd) = &self.etcd else {
            let mut changed = known.clone();
            how(&mut changed);
            self.state.set(NODES, &key.0, Some(&changed))?;
            return Ok(changed);
        };
        change(etcd, &format!("{SHARED_NODES}{key}"), |now: Option<Record>| {
            let mut changed = now.unwrap_or_else(|| known.clone());
            how(&mut changed);
            Some(changed)
        })?
        .ok_or_else(|| EtcdError::Refused("the node is gone".into()).into())
    }

    pub fn tokens(&self) -> Result<BTreeMap<[u8; 32], Token>, KeptError> {
        let Some(etcd) = &self.etcd else {
            return Ok(self.state.all(TOKENS, |digest| *digest)?.into_iter().collect());
        };
        let all = etcd.list(SHARED_TOKENS, 0)?.0;
        Ok(all.iter().filter_map(|found| token(&found.key, &found.value)).collect())
    }

    /// A token that another scheduler may have handed out just now.
    pub fn find_token(&self, digest: &[u8; 32]) -> Result<Option<Token>, KeptError> {
        let Some(etcd) = &self.etcd else { return Ok(None) };
        let found = etcd.get(&format!("{SHARED_TOKENS}{}", PublicKey(*digest)))?;
        Ok(found.and_then(|found| read(&found.key, &found.value)))
    }

    pub fn set_token(&self, digest: &[u8; 32], token: Option<&Token>) -> Result<(), KeptError> {
        let Some(etcd) = &self.etcd else { return Ok(self.state.set(TOKENS, digest, token)?) };
        let key = format!("{SHARED_TOKENS}{}", PublicKey(*digest));
        match token {
            Some(token) => put(etcd, key, token),
            None => Ok(etcd.transact(&[], &[Op::Delete(key)], &[]).map(drop)?),
        }
    }

    /// Uses a token up once more; returns what is left of it then, or none if nothing was left.
    pub fn use_token(&self, digest: &[u8; 32], known: &Token) -> Result<Option<Token>, KeptError> {
        let less = |token: &Token| {
            let uses = token.uses.checked_sub(1)?;
            Some(Token { uses, ..token.clone() })
        };
        let Some(etcd) = &self.etcd else {
            let Some(left) = less(known) else { return Ok(None) };
            self.state.set(TOKENS, digest, Some(&left))?;
            return Ok(Some(left));
        };
        let key = format!("{SHARED_TOKENS}{}", PublicKey(*digest));
        change(etcd, &key, |now: Option<Token>| less(&now?))
    }
}

/// A node's entry in etcd.
pub(super) fn node(key: &str, value: &[u8]) -> Option<(PublicKey, Record)> {
    Some((key.strip_prefix(SHARED_NODES)?.parse().ok()?, read(key, value)?))
}

/// A token's.
pub(super) fn token(key: &str, value: &[u8]) -> Option<([u8; 32], Token)> {
    let digest: PublicKey = key.strip_prefix(SHARED_TOKENS)?.parse().ok()?;
    Some((digest.0, read(key, value)?))
}

/// What a later program wrote in another way is passed over, and said so.
fn read<T: DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    let read = serde_json::from_slice(value);
    read.inspect_err(|error| tracing::warn!("{key} in etcd can't be read: {error}")).ok()
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings and numbers always serialise")
}

fn put<T: Serialize>(etcd: &Etcd, key: String, value: &T) -> Result<(), KeptError> {
    let put = Op::Put { key, value: json(value), lease: None };
    Ok(etcd.transact(&[], &[put], &[]).map(drop)?)
}

/// Changes an entry as `how` says, which sees it as it is; nothing, if that says so. Returns what was written.
fn change<T: Serialize + DeserializeOwned>(
    etcd: &Etcd,
    key: &str,
    how: impl Fn(Option<T>) -> Option<T>,
) -> Result<Option<T>, KeptError> {
    for _ in 0..TRIES {
        let found = etcd.get(key)?;
        let revision = found.as_ref().map_or(0, |found| found.revision);
        let Some(new) = how(found.and_then(|found| read(key, &found.value))) else { return Ok(None) };
        let put = Op::Put { key: key.to_owned(), value: json(&new), lease: None };
        if etcd.transact(&[(key, revision)], &[put], &[])?.succeeded {
            return Ok(Some(new));
        }
    }
    Err(EtcdError::Away(format!("others change {key} all the time")).into())
}
