//! The node's WireGuard identities: made here, kept in the state folder, and told to nobody but for their public keys.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_api::wireguard::{WIREGUARD_IDENTITIES_MAX, WIREGUARD_PORTS, WireguardIdentity};
use serde::{Deserialize, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};

use super::rotation::Phase;
use crate::files;

/// The file in the state folder.
const FILE: &str = "wireguard.json";

/// A key pair, with what decides how long it is used.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "Kept", into = "Kept")]
pub(super) struct Identity {
    kept: Kept,
    told: WireguardIdentity,
}

/// An identity as the file has it. The secret is wiped from memory when it is dropped.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    secret: StaticSecret,
    /// Counts the node's identities; those of two in a row have different links and ports.
    generation: u64,
    /// Seconds since 1970.
    made_s: u64,
    /// The cluster's key epoch at the time.
    key_epoch: u64,
}

impl From<Kept> for Identity {
    fn from(kept: Kept) -> Self {
        let public_key = PublicKey::from(&kept.secret).to_bytes().into();
        let told = WireguardIdentity { public_key, port: WIREGUARD_PORTS[slot_of(kept.generation)] };
        Self { kept, told }
    }
}

impl From<Identity> for Kept {
    fn from(identity: Identity) -> Self {
        identity.kept
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kept: Kept { secret: _, generation, made_s, key_epoch }, told } = self;
        f.debug_struct("Identity")
            .field("told", told)
            .field("generation", generation)
            .field("made_s", made_s)
            .field("key_epoch", key_epoch)
            .finish_non_exhaustive()
    }
}

fn slot_of(generation: u64) -> usize {
    (generation % 2) as usize
}

fn seconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Identity {
    fn make(generation: u64, key_epoch: u64, now: SystemTime) -> Self {
        let (secret, made_s) = (StaticSecret::random(), seconds(now));
        Kept { secret, generation, made_s, key_epoch }.into()
    }

    /// The public key, and the port that its device listens on.
    pub(super) fn told(&self) -> WireguardIdentity {
        self.told
    }

    pub(super) fn secret(&self) -> &StaticSecret {
        &self.kept.secret
    }

    /// Which of the two links is the identity's.
    pub(super) fn slot(&self) -> usize {
        slot_of(self.kept.generation)
    }

    /// When it was made.
    pub(super) fn made(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.kept.made_s)
    }

    /// Whether another identity is to take its place: it is older than `interval`, or the operator asked for new ones
    /// since it was made. One that a clock put in the future is as old as it will be.
    pub(super) fn is_due(&self, key_epoch: u64, now: SystemTime, interval: Duration) -> bool {
        self.kept.key_epoch < key_epoch || seconds(now).abs_diff(self.kept.made_s) >= interval.as_secs()
    }
}

/// The identities that the node holds, in the order that it describes them in: the one that the others are to send to,
/// which is also the one that it sends from, comes first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Keyring {
    identities: Vec<Identity>,
}

impl Keyring {
    /// What the state folder has; nothing where there is no such file.
    pub(super) fn load(state_dir: &Path) -> io::Result<Self> {
        let keyring: Self = files::read_json(&state_dir.join(FILE))?.unwrap_or_default();
        let is_sound = match keyring.identities.as_slice() {
            [] | [_] => true,
            [first, second] => first.slot() != second.slot(),
            _ => false,
        };
        if is_sound { Ok(keyring) } else { Err(io::Error::other("its identities don't go together")) }
    }

    /// Writes the file, for root alone to read.
    pub(super) fn save(&self, state_dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(state_dir)?;
        files::write_json(&state_dir.join(FILE), self, files::SECRET)
    }

    /// Removes the file.
    pub(super) fn forget(state_dir: &Path) -> io::Result<()> {
        files::remove(&state_dir.join(FILE))
    }

    pub(super) fn identities(&self) -> &[Identity] {
        &self.identities
    }

    /// What the others are to know.
    pub(super) fn told(&self) -> Vec<WireguardIdentity> {
        self.identities.iter().map(Identity::told).collect()
    }

    /// How far a change of keys has come.
    pub(super) fn phase(&self) -> Phase {
        match self.identities.as_slice() {
            [first, second] if first.kept.generation < second.kept.generation => Phase::Introduced,
            [_, _] => Phase::Switched,
            _ => Phase::Steady,
        }
    }

    /// With an identity more, which comes last.
    pub(super) fn introduce(&self, key_epoch: u64, now: SystemTime) -> Self {
        let mut identities = self.identities.clone();
        let generation = identities.iter().map(|identity| identity.kept.generation).max().unwrap_or(0) + 1;
        identities.push(Identity::make(generation, key_epoch, now));
        debug_assert!(identities.len() <= WIREGUARD_IDENTITIES_MAX);
        Self { identities }
    }

    /// With the last identity first.
    pub(super) fn switch(&self) -> Self {
        let mut identities = self.identities.clone();
        identities.rotate_right(1);
        Self { identities }
    }

    /// With the first identity alone.
    pub(super) fn retire(&self) -> Self {
        Self { identities: self.identities.first().cloned().into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: SystemTime = UNIX_EPOCH;

    #[test]
    fn identities_take_turns_at_the_links_through_a_change_of_keys() {
        let first = Keyring::default().introduce(3, NOW);
        assert_eq!(first.phase(), Phase::Steady);
        let two = first.introduce(4, NOW);
        assert_eq!(two.phase(), Phase::Introduced);
        assert_eq!(two.told()[0], first.told()[0]);
        let switched = two.switch();
        assert_eq!(switched.phase(), Phase::Switched);
        assert_eq!(switched.told(), [two.told()[1], two.told()[0]]);
        let second = switched.retire();
        assert_eq!(second.phase(), Phase::Steady);
        assert_eq!(second.told(), [two.told()[1]]);
        let slots = [&first, &second].map(|keyring| keyring.identities[0].slot());
        assert_eq!(slots, [1, 0]);
        assert_eq!(slots.map(|slot| WIREGUARD_PORTS[slot]), [first.told()[0].port, second.told()[0].port]);
        assert_eq!(second.introduce(4, NOW).identities[1].slot(), 1);
    }

    #[test]
    fn the_public_key_is_the_secret_s_as_rfc_7748_has_it() {
        let secret = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let identity = Identity::from(Kept { secret: secret.into(), generation: 1, made_s: 0, key_epoch: 0 });
        assert_eq!(identity.told().public_key.to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        let said = format!("{identity:?}");
        assert!(said.contains("hSDwCY") && !said.contains("77, 07") && !said.contains("119, 7"), "{said}");
    }

    #[test]
    fn an_identity_is_due_by_age_and_by_epoch() {
        let hour = Duration::from_hours(1);
        let made = UNIX_EPOCH + 100 * hour;
        let identity = Identity::make(1, 5, made);
        let due = |epoch, now| identity.is_due(epoch, now, 12 * hour);
        assert!(!due(5, made) && !due(4, made + 11 * hour) && !due(5, made - 11 * hour));
        assert!(due(6, made) && due(5, made + 12 * hour) && due(5, made - 12 * hour));
    }

    #[test]
    fn the_file_is_root_s_alone_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("state");
        assert_eq!(Keyring::load(&dir).unwrap().told(), []);
        let keyring = Keyring::default().introduce(0, NOW).introduce(0, NOW);
        keyring.save(&dir).unwrap();
        let loaded = Keyring::load(&dir).unwrap();
        assert_eq!(loaded.told(), keyring.told());
        let secrets = |keyring: &Keyring| -> Vec<_> {
            keyring.identities.iter().map(|identity| identity.secret().to_bytes()).collect()
        };
        assert_eq!(secrets(&loaded), secrets(&keyring));
        assert_eq!(std::fs::metadata(dir.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        Keyring::forget(&dir).unwrap();
        Keyring::forget(&dir).unwrap();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn identities_that_would_share_a_link_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::make(1, 0, NOW);
        Keyring { identities: vec![identity.clone(), identity] }.save(folder.path()).unwrap();
        assert!(Keyring::load(folder.path()).is_err());
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(Keyring::load(folder.path()).is_err());
    }
}
