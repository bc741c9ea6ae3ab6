//! What a fuzzer is given to try of this crate: functions of bytes that panic on what must not be. And, in [`corpus`] and
//! [`mutation`], how this crate and those above it try them without one.

#![expect(clippy::missing_panics_doc, reason = "to panic on what must not be is what the targets are for")]

pub mod corpus;
pub mod mutation;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::pin::pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use rustls::pki_types::CertificateDer;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{
    AGENT_FRAME_BYTES_MAX, CodecError, FrameReader, FrameWriter, JOIN_FRAME_BYTES_MAX,
    MANAGER_FRAME_BYTES_MAX,
};
use crate::session::{AgentMessage, JoinAnswer, JoinRequest, ManagerMessage, ReadmitAnswer, ReadmitRequest};
use crate::table::{Delta, Table};
use crate::tls::{CertificateFacts, Credential, Former, Identity, KeyRequest, Peer, Roots};
use crate::token::JoinToken;

/// Tries bytes, and panics on what must not be; true if they were sound.
pub type Target = fn(&[u8]) -> bool;

/// The targets by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("agent_message", agent_message),
    ("manager_message", manager_message),
    ("exchange", exchange),
    ("token", token),
    ("certificate", certificate),
];

/// What agents say to managers: bodies of frames, one a line; and the bytes as they are, as a stream.
pub fn agent_message(data: &[u8]) -> bool {
    stream::<AgentMessage>(data, AGENT_FRAME_BYTES_MAX);
    lines(data).filter(|body| message::<AgentMessage>(body, AGENT_FRAME_BYTES_MAX).is_some()).count() > 0
}

/// What managers say to agents, likewise; snapshots and deltas lead to a table.
pub fn manager_message(data: &[u8]) -> bool {
    stream::<ManagerMessage>(data, MANAGER_FRAME_BYTES_MAX);
    let (mut table, mut is_sound): (Option<Table>, bool) = (None, false);
    for body in lines(data) {
        let Some(message) = message::<ManagerMessage>(body, MANAGER_FRAME_BYTES_MAX) else { continue };
        is_sound = true;
        match (message, &mut table) {
            (ManagerMessage::Snapshot { table: sent }, _) => table = Some(*sent),
            (ManagerMessage::Delta { delta: Delta { changes, to, .. } }, Some(table)) => {
                let delta = Delta { from: table.index, to, changes };
                assert!(table.apply(delta).is_ok() && table.index == to);
            }
            _ => {}
        }
    }
    is_sound
}

/// What is said before there is a session, both ways: requests to join and to come back, and the answers.
pub fn exchange(data: &[u8]) -> bool {
    stream::<JoinRequest>(data, JOIN_FRAME_BYTES_MAX);
    let mut is_sound = false;
    for body in lines(data) {
        is_sound |= message::<JoinRequest>(body, JOIN_FRAME_BYTES_MAX).is_some();
        is_sound |= message::<JoinAnswer>(body, JOIN_FRAME_BYTES_MAX).is_some();
        is_sound |= message::<ReadmitRequest>(body, JOIN_FRAME_BYTES_MAX).is_some();
        is_sound |= message::<ReadmitAnswer>(body, JOIN_FRAME_BYTES_MAX).is_some();
    }
    is_sound
}

/// Join tokens: they are read as they are written, or not at all.
pub fn token(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let Ok(token) = text.parse::<JoinToken>() else { return false };
    assert_eq!(token.to_string(), text);
    assert!(format!("{token:?}").ends_with("-…"), "the secret is shown");
    true
}

/// Certificates, chains, keys and roots, as PEM and as DER.
pub fn certificate(data: &[u8]) -> bool {
    static OWN: LazyLock<Option<KeyRequest>> = LazyLock::new(|| KeyRequest::new().ok());
    let text = String::from_utf8_lossy(data);
    let roots = Roots::from_pem(&text);
    if let Ok(roots) = &roots {
        assert_eq!(Roots::from_pem(&roots.to_pem()).as_ref(), Ok(roots));
        let _ = Former::of(&text, roots).is_ok();
    }
    let identity = Identity::from_pem(&text);
    if let Ok(identity) = &identity {
        let Ok(back) = Identity::from_pem(&identity.to_pem()) else {
            panic!("an identity does not read back")
        };
        assert_eq!((back.to_pem(), back.peer()), (identity.to_pem(), identity.peer()));
        let roots = Roots::from_pem(&identity.chain());
        let _ = roots.map(|roots| Credential { identity: identity.clone(), roots }.check().is_ok());
    }
    let _ = OWN.as_ref().map(|key| key.identity(&text).is_ok());
    let der = CertificateDer::from(data);
    let read = [Peer::of(&der).is_ok(), CertificateFacts::of(&der).is_ok()];
    roots.is_ok() || identity.is_ok() || read.contains(&true)
}

/// The bodies of several messages: JSON that is written has no line feeds.
pub fn lines(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    data.split(|byte| *byte == b'\n')
}

/// Reads bytes as frames, to the first that is none.
pub fn stream<T: DeserializeOwned>(data: &[u8], frame_bytes_max: u32) {
    let mut reader = FrameReader::<_, T>::new(data, frame_bytes_max);
    loop {
        match now(reader.next()) {
            Ok(Some(_)) => {}
            Err(CodecError::TooLong { len, max }) => return assert!(len > max),
            Ok(None) | Err(_) => return,
        }
    }
}

/// The message that is the body of a frame, if it is one; it is read as it is written.
pub fn message<T: Serialize + DeserializeOwned + Debug + PartialEq>(
    body: &[u8],
    frame_bytes_max: u32,
) -> Option<T> {
    let read = framed::<T>(body, frame_bytes_max)?;
    let Some(body) = written(&read) else { panic!("it is not written: {read:?}") };
    // What is written may be longer than what was read.
    assert_eq!(framed::<T>(&body, u32::MAX).as_ref(), Some(&read));
    Some(read)
}

/// Reads the body of one frame.
pub fn framed<T: DeserializeOwned>(body: &[u8], frame_bytes_max: u32) -> Option<T> {
    let len = u32::try_from(body.len()).ok()?;
    let frame = [&len.to_be_bytes(), body].concat();
    now(FrameReader::new(&*frame, frame_bytes_max).next()).ok().flatten()
}

/// The body of the frame that a message is written as.
pub fn written<T: Serialize>(message: &T) -> Option<Vec<u8>> {
    let mut frame = Vec::new();
    now(FrameWriter::new(&mut frame).send(message)).ok()?;
    Some(frame.split_off(4))
}

/// What a future comes to that waits for nothing.
///
/// # Panics
///
/// If it does.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("it waits for something"),
    }
}
