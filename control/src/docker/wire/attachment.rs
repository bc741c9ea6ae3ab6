//! Attachments, which Docker's API has no words for: in its style.

use serde::Serialize;

use super::optional_fields;

optional_fields! {
    /// What to attach, and to what.
    AttachmentRequest {
        network: String,
        name: String,
        aliases: Vec<String>,
        #[serde(rename = "IPv4Address")]
        ipv4_address: String,
        pid: u32,
        netns: String,
        interface: String,
    }
}

/// An attachment.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Attachment {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    #[serde(rename = "NetworkID")]
    pub(in crate::docker) network_id: String,
    pub(in crate::docker) network: String,
    pub(in crate::docker) name: String,
    pub(in crate::docker) aliases: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) netns: Option<String>,
    pub(in crate::docker) interface: String,
    pub(in crate::docker) addresses: Vec<String>,
    pub(in crate::docker) gateways: Vec<String>,
    pub(in crate::docker) name_server: String,
    pub(in crate::docker) mac_address: String,
    #[serde(rename = "MTU")]
    pub(in crate::docker) mtu: u32,
    pub(in crate::docker) created_at: String,
}
