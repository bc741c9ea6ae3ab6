//! What the node remembers across restarts: its membership with what proves it, and the last table. On a manager, its own
//! key is sealed with what seals the manager's state.
//!
//! The table is a file of all of it and one of the deltas since. A delta is written before the dataplane hears of it, so
//! that an agent that is killed comes back with no older table than its maps hold. It is not flushed to the disk: a host
//! that loses power loses its maps as well.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::id::{ClusterId, NodeId};
use mesh_api::seal::Seal;
use mesh_api::table::{Delta, Role, Table};
use mesh_api::tls::{Credential, Identity, Peer, Roots};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::files;
use crate::runtime::GUESTS_FOLDER;
use crate::sys::memory;

/// Bytes of deltas that are kept beside a table of any size before it is written again.
const DELTAS_BYTES_MIN: u64 = 1 << 20;
/// How long a table that could not be written is left at that.
const RETRY: Duration = Duration::from_secs(30);

/// This node's place in a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The node's id in it.
    pub node_id: NodeId,
    /// Manager or worker, as the managers last said.
    pub role: Role,
    /// The address that the node advertises.
    pub advertise: IpAddr,
    /// Its VXLAN address.
    pub data_path: IpAddr,
    /// The managers that it knows.
    pub remotes: Vec<SocketAddr>,
}

/// A membership, and what proves it.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    pub(crate) membership: Membership,
    pub(crate) credential: Arc<Credential>,
}

/// What the node's key is sealed under.
const KEY_NAME: &[u8] = b"node key";

/// `membership.json`, readable by root alone.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub(crate) membership: Membership,
    key: KeptKey,
    /// Its certificate chain, PEM.
    chain: String,
    /// The roots that it trusts, PEM.
    roots: String,
}

/// The node's key, PEM.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KeptKey {
    Clear(String),
    /// As base 64.
    Sealed(String),
}

impl std::fmt::Debug for KeptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeptKey(…)")
    }
}

impl Kept {
    /// Seals the key where it makes the node a manager: whoever has it is one.
    fn new(credentials: &Credentials, seal: Option<&Seal>) -> Self {
        let Credentials { membership, credential } = credentials.clone();
        let Credential { identity, roots } = &*credential;
        let seal = seal.filter(|_| identity.peer().role == Role::Manager);
        let key = match seal {
            Some(seal) => KeptKey::Sealed(STANDARD.encode(seal.seal(KEY_NAME, identity.key().as_bytes()))),
            None => KeptKey::Clear(identity.key()),
        };
        Self { membership, key, chain: identity.chain(), roots: roots.to_pem() }
    }

    /// The node, as its certificate says.
    pub(crate) fn peer(&self) -> io::Result<Peer> {
        let chain = Roots::from_pem(&self.chain).map_err(io::Error::other)?;
        let own = chain.certificates().first().ok_or(io::ErrorKind::InvalidData)?;
        Peer::of(own).map_err(io::Error::other)
    }

    /// With the key, which one of `seals` opens if it is sealed.
    pub(crate) fn credentials(self, seals: &[Option<&Seal>]) -> io::Result<Credentials> {
        let Self { membership, key, chain, roots } = self;
        let key = match key {
            KeptKey::Clear(key) => key,
            KeptKey::Sealed(text) => {
                let sealed = STANDARD.decode(text).map_err(io::Error::other)?;
                let opened = seals.iter().flatten().find_map(|seal| seal.open(KEY_NAME, &sealed).ok());
                let key = opened.and_then(|key| String::from_utf8(key).ok());
                key.ok_or_else(|| {
                    io::Error::other("the node's key is sealed, and the manager's folder does not open it")
                })?
            }
        };
        let identity = Identity::from_pem(&(key + &chain)).map_err(io::Error::other)?;
        let roots = Roots::from_pem(&roots).map_err(io::Error::other)?;
        Ok(Credentials { membership, credential: Arc::new(Credential { identity, roots }) })
    }
}

/// The state folder of an agent. Clones share what is done with it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    dir: PathBuf,
    guarded: Arc<Mutex<Guarded>>,
}

/// Held while something is written.
#[derive(Debug)]
struct Guarded {
    /// Whether tables may be written: a write that is on its way must not come after the host has left its cluster.
    is_member: bool,
    /// Seals a manager's key.
    seal: Option<Arc<Seal>>,
}

impl Store {
    pub(crate) fn new(dir: &Path) -> Self {
        let guarded = Guarded { is_member: true, seal: None };
        Self { dir: dir.to_owned(), guarded: Arc::new(Mutex::new(guarded)) }
    }

    fn guarded(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn membership(&self) -> PathBuf {
        self.dir.join("membership.json")
    }

    fn table(&self) -> PathBuf {
        self.dir.join("table.json")
    }

    /// The deltas since the table was written, one a line.
    fn deltas(&self) -> PathBuf {
        self.dir.join("deltas.json")
    }

    /// The folder of the tasks' folders.
    pub(crate) fn tasks(&self) -> PathBuf {
        self.dir.join("tasks")
    }

    /// The folder of the files of attachments.
    pub(crate) fn attachments(&self) -> PathBuf {
        self.dir.join(GUESTS_FOLDER)
    }

    /// The membership with what proves it, as it is kept: the key may be sealed.
    pub(crate) fn load(&self) -> io::Result<Option<Kept>> {
        files::read_json(&self.membership())
    }

    pub(crate) fn load_credentials(&self) -> io::Result<Option<Credentials>> {
        let guarded = self.guarded();
        let kept = self.load()?;
        kept.map(|kept| kept.credentials(&[guarded.seal.as_deref()])).transpose()
    }

    pub(crate) fn save_credentials(&self, credentials: &Credentials) -> io::Result<()> {
        let mut guarded = self.guarded();
        std::fs::create_dir_all(&self.dir)?;
        let kept = Kept::new(credentials, guarded.seal.as_deref());
        files::write_json(&self.membership(), &kept, files::SECRET)?;
        guarded.is_member = true;
        Ok(())
    }

    /// Seals a manager's key with `seal` from here on, what is on the disk included; or not at all.
    pub(crate) fn set_seal(&self, seal: Option<Arc<Seal>>) -> io::Result<()> {
        let mut guarded = self.guarded();
        let is_same = match (&guarded.seal, &seal) {
            (Some(present), Some(next)) => Arc::ptr_eq(present, next),
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return Ok(());
        }
        if let Some(kept) = self.load()? {
            let credentials = kept.credentials(&[guarded.seal.as_deref(), seal.as_deref()])?;
            files::write_json(&self.membership(), &Kept::new(&credentials, seal.as_deref()), files::SECRET)?;
        }
        guarded.seal = seal;
        Ok(())
    }

    /// The last table; none where it can't be read, since the managers have it.
    pub(crate) fn load_table(&self) -> Option<Table> {
        let table = files::read_json(&self.table()).unwrap_or_else(|error| {
            warn!(file = %self.table().display(), %error, "the last table can't be read");
            None
        });
        let mut table: Table = table?;
        let deltas = File::open(self.deltas()).map(BufReader::new);
        for line in deltas.into_iter().flat_map(BufReader::lines) {
            // The agent, or the host, may have ended amid the last one.
            let delta = line.ok().and_then(|line| serde_json::from_str::<Delta>(&line).ok());
            let Some(delta) = delta else { break };
            // Those that the table has already are left by an agent that ended before it removed them.
            if delta.from >= table.index && table.apply(delta).is_err() {
                break;
            }
        }
        Some(table)
    }

    /// Writes all of the table, which makes the deltas so far useless; returns its size in bytes. Nothing is written once
    /// the membership is forgotten. Task specifications hold environments, and these secrets.
    fn save_table(&self, table: &Table) -> io::Result<u64> {
        let guarded = self.guarded();
        if guarded.is_member {
            files::write_json(&self.table(), table, files::SECRET)?;
            files::remove(&self.deltas())?;
        }
        std::fs::metadata(self.table()).map(|metadata| metadata.len())
    }

    /// Forgets the membership and the table.
    pub(crate) fn forget(&self) -> Vec<io::Error> {
        let mut guarded = self.guarded();
        guarded.is_member = false;
        let removed = [self.membership(), self.table(), self.deltas()].map(|path| files::remove(&path));
        removed.into_iter().filter_map(Result::err).collect()
    }
}

/// Writes the table and its deltas as they come.
#[derive(Debug)]
pub(super) struct TableWriter {
    store: Store,
    /// The file of deltas. Without one, the whole table is to be written first.
    deltas: Option<File>,
    deltas_bytes: u64,
    table_bytes: u64,
    /// When the whole table could not be written.
    failed: Option<Instant>,
}

impl TableWriter {
    /// For what `store` holds.
    pub(super) fn new(store: Store) -> Self {
        let size = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.len()).ok();
        // Deltas that are there may break off in the middle: what comes after them would not be read.
        let is_fresh = size(&store.deltas()).is_none_or(|bytes| bytes == 0);
        let table_bytes = size(&store.table()).filter(|_| is_fresh);
        let deltas = table_bytes.and_then(|_| open(&store.deltas()).ok());
        Self { store, deltas, deltas_bytes: 0, table_bytes: table_bytes.unwrap_or_default(), failed: None }
    }

    /// Writes a delta: at once, into the system's memory.
    pub(super) fn append(&mut self, delta: &Delta) {
        let Some(file) = &mut self.deltas else { return };
        let written = serde_json::to_vec(delta).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            file.write_all(&line)?;
            Ok(line.len() as u64)
        });
        match written {
            Ok(bytes) => self.deltas_bytes += bytes,
            Err(error) => {
                warn!(%error, "a change of the table can't be written to the state folder");
                self.deltas = None;
            }
        }
    }

    /// Whether the whole table is to be written before the next delta: for lack of a file to add it to, or because that
    /// has outgrown the table.
    pub(super) fn wants_table(&self) -> bool {
        match &self.deltas {
            Some(_) => self.deltas_bytes > self.table_bytes.max(DELTAS_BYTES_MIN),
            None => self.failed.is_none_or(|failed| failed.elapsed() >= RETRY),
        }
    }

    /// Writes the whole table.
    pub(super) async fn write(&mut self, table: Arc<Table>) {
        let store = self.store.clone();
        self.deltas = None;
        let written = tokio::task::spawn_blocking(move || {
            let bytes = store.save_table(&table)?;
            // What was freed since the last one, in small pieces.
            memory::trim();
            Ok::<_, io::Error>((bytes, open(&store.deltas())?))
        });
        match written.await {
            Ok(Ok((bytes, deltas))) => {
                (self.table_bytes, self.deltas_bytes, self.deltas) = (bytes, 0, Some(deltas));
            }
            Ok(Err(error)) => {
                warn!(%error, "the table can't be written to the state folder");
                self.failed = Some(Instant::now());
            }
            // The runtime is shutting down.
            Err(_) => {}
        }
    }
}

/// The file of deltas, to add to.
fn open(deltas: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(files::SECRET).open(deltas)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::unix::fs::PermissionsExt as _;

    use mesh_api::table::{Change, ClusterRecord, ReturnPath};
    use mesh_api::tls::testing::{Ca, Wanted};

    use super::*;

    fn credentials() -> Credentials {
        let membership = Membership {
            cluster_id: "c".into(),
            node_id: "n".into(),
            role: Role::Worker,
            advertise: Ipv4Addr::new(192, 0, 2, 1).into(),
            data_path: Ipv4Addr::new(192, 0, 2, 2).into(),
            remotes: vec!["192.0.2.9:2377".parse().unwrap()],
        };
        let wanted = Wanted::new("n", Role::Worker, "c");
        Credentials { membership, credential: Arc::new(Ca::new().credential(&wanted)) }
    }

    fn cluster(hash_seed: u64) -> ClusterRecord {
        let (data_path_port, return_path) = (4789, ReturnPath::Tunnel);
        ClusterRecord { id: "c".into(), hash_seed, data_path_port, return_path, key_epoch: 0 }
    }

    /// A table that was changed `index` times.
    fn table(index: u64) -> Table {
        Table { index, ..Table::new(cluster(index)) }
    }

    fn delta(from: u64) -> Delta {
        Delta { from, to: from + 1, changes: vec![Change::Cluster(cluster(from + 1))] }
    }

    #[test]
    fn what_was_saved_is_loaded_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("state"));
        assert!(store.load_credentials().unwrap().is_none());
        store.save_credentials(&credentials()).unwrap();
        store.save_table(&table(7)).unwrap();
        assert_eq!(store.load_credentials().unwrap().unwrap().membership, credentials().membership);
        assert_eq!(store.load_table(), Some(table(7)));
        assert!(store.forget().is_empty());
        assert!(store.load_credentials().unwrap().is_none());
        assert!(store.load_table().is_none());
    }

    #[tokio::test]
    async fn deltas_are_loaded_with_the_table_that_they_follow() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut writer = TableWriter::new(store.clone());
        assert!(writer.wants_table());
        writer.write(Arc::new(table(5))).await;
        assert!(!writer.wants_table());
        for from in [5, 6] {
            writer.append(&delta(from));
        }
        assert_eq!(store.load_table(), Some(table(7)));

        // The next agent begins with the whole table, whatever the last line looks like.
        let mut file = open(&store.deltas()).unwrap();
        file.write_all(b"{\"from\":7").unwrap();
        assert_eq!(store.load_table(), Some(table(7)));
        let mut writer = TableWriter::new(store.clone());
        assert!(writer.wants_table());
        writer.write(Arc::new(table(7))).await;
        writer.append(&delta(7));
        assert_eq!(store.load_table(), Some(table(8)));
    }

    #[tokio::test]
    async fn deltas_that_the_table_has_already_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut writer = TableWriter::new(store.clone());
        writer.write(Arc::new(table(5))).await;
        for from in [5, 6] {
            writer.append(&delta(from));
        }
        files::write_json(&store.table(), &table(6), files::SECRET).unwrap();
        assert_eq!(store.load_table(), Some(table(7)));
    }

    #[tokio::test]
    async fn many_deltas_ask_for_the_table() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut writer = TableWriter::new(store.clone());
        writer.write(Arc::new(table(0))).await;
        let mut deltas = (0..).map(delta);
        while !writer.wants_table() {
            writer.append(&deltas.next().unwrap());
        }
        let written = deltas.next().unwrap().from;
        assert!(written > 1000, "{written}");
        assert_eq!(store.load_table(), Some(table(written)));
    }

    #[tokio::test]
    async fn nothing_is_written_once_the_membership_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut writer = TableWriter::new(store.clone());
        assert!(store.forget().is_empty());
        writer.write(Arc::new(table(1))).await;
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        store.save_credentials(&credentials()).unwrap();
        writer.failed = None;
        writer.write(Arc::new(table(1))).await;
        assert_eq!(store.load_table(), Some(table(1)));
    }

    #[test]
    fn the_membership_is_kept_in_both_families_and_for_root_alone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        for (addr, remote) in [("192.0.2.1", "192.0.2.9:2377"), ("2001:db8::1", "[2001:db8::9]:2377")] {
            let mut credentials = credentials();
            credentials.membership.advertise = addr.parse().unwrap();
            credentials.membership.remotes = vec![remote.parse().unwrap()];
            store.save_credentials(&credentials).unwrap();
            let kept = store.load_credentials().unwrap().unwrap();
            assert_eq!(kept.membership, credentials.membership);
            assert_eq!(kept.credential.identity.to_pem(), credentials.credential.identity.to_pem());
            assert_eq!(kept.credential.roots, credentials.credential.roots);
            let mode = std::fs::metadata(store.membership()).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, files::SECRET);
        }
        let key = credentials().credential.identity.to_pem();
        assert!(key.contains("PRIVATE KEY") && !format!("{:?}", credentials()).contains("PRIVATE KEY"));
    }

    #[test]
    fn a_managers_key_is_sealed_and_a_workers_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let ca = Ca::new();
        let of = |role| {
            let credential = Arc::new(ca.credential(&Wanted::new("n", role, "c")));
            Credentials { membership: Membership { role, ..credentials().membership }, credential }
        };
        let text = || std::fs::read_to_string(store.membership()).unwrap();
        let in_the_clear = || text().contains("PRIVATE KEY");
        let (former, seal) = ([7; 32], Arc::new(Seal::new([7; 32], &[])));
        store.set_seal(Some(Arc::clone(&seal))).unwrap();
        store.save_credentials(&of(Role::Worker)).unwrap();
        assert!(in_the_clear());

        let manager = of(Role::Manager);
        store.save_credentials(&manager).unwrap();
        assert!(!in_the_clear());
        let own =
            |store: &Store| store.load_credentials().map(|kept| kept.unwrap().credential.identity.to_pem());
        assert_eq!(own(&store).unwrap(), manager.credential.identity.to_pem());

        // Another agent, which has to be given the seal; what it is does not need it.
        let other = Store::new(folder.path());
        let kept = other.load().unwrap().unwrap();
        assert_eq!((&kept.membership, kept.peer().unwrap().role), (&manager.membership, Role::Manager));
        let error = own(&other).unwrap_err();
        assert!(error.to_string().contains("the node's key is sealed"), "{error}");
        assert!(other.set_seal(Some(Arc::new(Seal::new([8; 32], &[])))).is_err());
        let next = Arc::new(Seal::new([8; 32], &[former]));
        let before = text();
        other.set_seal(Some(next)).unwrap();
        assert!(!in_the_clear() && before != text(), "sealed anew");
        assert_eq!(own(&other).unwrap(), manager.credential.identity.to_pem());
        assert!(Kept::credentials(other.load().unwrap().unwrap(), &[Some(&seal)]).is_err());

        other.set_seal(None).unwrap();
        assert!(in_the_clear());
        assert_eq!(own(&Store::new(folder.path())).unwrap(), manager.credential.identity.to_pem());
        assert!(other.forget().is_empty());
        other.set_seal(Some(seal)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "there is nothing to seal");
    }

    #[test]
    fn a_membership_without_a_whole_identity_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        store.save_credentials(&credentials()).unwrap();
        let text = std::fs::read_to_string(store.membership()).unwrap();
        for (whole, spoilt) in [("PRIVATE KEY", "PUBLIC KEY"), ("BEGIN CERTIFICATE", "BEGIN"), ("\"n\"", "n")]
        {
            std::fs::write(store.membership(), text.replace(whole, spoilt)).unwrap();
            assert!(store.load_credentials().is_err(), "{spoilt}");
        }
    }

    #[test]
    fn a_spoilt_table_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("table.json"), "{").unwrap();
        assert_eq!(Store::new(folder.path()).load_table(), None);
    }
}
