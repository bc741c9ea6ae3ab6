//! What `docker network create` asks for, read and checked.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::VNI_OPTION;
use crate::apply::has_room;
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::names;
use crate::docker::wire::network as wire;
use crate::model::{Ipam6Config, IpamConfig, NetworkSpec, labels};

/// Names that Docker keeps for itself.
const PREDEFINED: [&str; 4] = ["bridge", "host", "none", "default"];

/// What a request asks for, checked.
pub(in crate::docker) fn spec(request: wire::CreateRequest) -> ApiResult<NetworkSpec> {
    let wire::CreateRequest {
        name,
        driver: _,
        scope,
        internal,
        attachable,
        ingress,
        config_only,
        config_from,
        ipam,
        enable_ipv4,
        enable_ipv6,
        options,
        labels,
    } = request;
    let name = name.unwrap_or_default();
    if PREDEFINED.contains(&name.as_str()) {
        return Err(ApiError::forbidden(format!(
            "{name} is a pre-defined network and cannot be created: choose another Name"
        )));
    }
    // As `apply` has it: what names a service, or several with dots between them.
    if name.split('.').any(|part| names::check("Name", part).is_err()) {
        return Err(ApiError::invalid(format!(
            "invalid Name '{name}': name must be valid as a DNS name (parts of letters, digits, and - or _ between them)"
        )));
    }
    if !matches!(scope.as_deref(), None | Some("" | "swarm" | "global")) {
        return Err(ApiError::invalid(format!(
            "Scope: '{}' is not an overlay's: expected swarm",
            scope.unwrap_or_default()
        )));
    }
    let config_from = config_from.and_then(|from| from.get("Network")?.as_str().map(str::to_owned));
    if config_only == Some(true) || config_from.is_some_and(|network| !network.is_empty()) {
        return Err(ApiError::unsupported(
            "ConfigOnly, ConfigFrom: not supported (leave out --config-only, --config-from)",
        ));
    }
    if enable_ipv4 == Some(false) {
        return Err(ApiError::unsupported(
            "EnableIPv4: every overlay has IPv4, since IPv6 addresses follow from IPv4 addresses (leave out --ipv4=false)",
        ));
    }
    let labels = labels.unwrap_or_default();
    labels::only_known(labels::Owner::Network, &labels)
        .map_err(|error| ApiError::invalid(format!("Labels: {error}")))?;
    let options = options.unwrap_or_default();
    if options.contains_key(VNI_OPTION) {
        return Err(ApiError::unsupported(format!(
            "Options.{VNI_OPTION}: not supported (leave out --opt {VNI_OPTION}): identifiers are given by the managers"
        )));
    }
    let ipam = ipam.unwrap_or_default();
    let driver = ipam.driver.unwrap_or_default();
    if !["", "default"].contains(&driver.as_str()) {
        return Err(ApiError::unsupported(format!(
            "IPAM.Driver: '{driver}' is not there: leave out --ipam-driver, or use 'default'"
        )));
    }
    let (ipam, ipam6) = ipam_configs(&ipam.config.unwrap_or_default(), enable_ipv6 == Some(true))?;
    Ok(NetworkSpec {
        name,
        labels,
        options,
        internal: internal.unwrap_or_default(),
        attachable: attachable.unwrap_or_default(),
        ingress: ingress.unwrap_or_default(),
        ipam,
        ipam6,
    })
}

/// What a request asks for as another subnet of a network, checked.
pub(in crate::docker) fn another_subnet(config: &wire::IpamConfigRequest) -> ApiResult<IpamConfig> {
    match subnet(config.subnet.as_deref(), "Subnet", "invalid subnet")? {
        Some(IpNet::V6(subnet)) => Err(ApiError::invalid(format!(
            "Subnet: {subnet} is IPv6, and a network has one such subnet, from when it is made: give an IPv4 subnet"
        ))),
        Some(IpNet::V4(subnet)) => ipam_config(config, Some(subnet), ""),
        None => ipam_config(config, None, ""),
    }
}

/// The IPv4 entries, and IPv6 if the network is to have it. Errors name an entry's fields with `entry` before them.
fn ipam_configs(
    configs: &[wire::IpamConfigRequest],
    ipv6: bool,
) -> ApiResult<(Vec<IpamConfig>, Option<Ipam6Config>)> {
    let (mut ipam, mut ipam6) = (Vec::new(), ipv6.then(Ipam6Config::default));
    for (at, config) in configs.iter().enumerate() {
        let entry = &format!("IPAM.Config[{at}].");
        let field = format!("{entry}Subnet");
        match subnet(config.subnet.as_deref(), &field, "invalid subnet")? {
            Some(IpNet::V6(subnet)) => match &mut ipam6 {
                None => {
                    return Err(ApiError::invalid(format!(
                        "{field}: {subnet} is IPv6, and the network is not: add --ipv6"
                    )));
                }
                Some(Ipam6Config { subnet: Some(first), .. }) => {
                    return Err(ApiError::invalid(format!(
                        "{field}: {subnet} is a second IPv6 subnet beside {first}, and a network has one: leave out one \
                         --subnet"
                    )));
                }
                Some(ipam6) => *ipam6 = ipam6_config(config, subnet, entry)?,
            },
            Some(IpNet::V4(subnet)) => ipam.push(ipam_config(config, Some(subnet), entry)?),
            None => ipam.push(ipam_config(config, None, entry)?),
        }
    }
    Ok((ipam, ipam6))
}

fn ipam6_config(config: &wire::IpamConfigRequest, subnet: Ipv6Net, entry: &str) -> ApiResult<Ipam6Config> {
    if config.ip_range.as_ref().is_some_and(|range| !range.is_empty()) {
        return Err(ApiError::unsupported(format!(
            "{entry}IPRange: IPv6 addresses follow from IPv4 addresses: give the range of the IPv4 subnet \
             (--ip-range)"
        )));
    }
    let gateway = config.gateway.as_deref().filter(|text| !text.is_empty());
    let gateway = gateway.map(|text| {
        text.parse::<Ipv6Addr>().map_err(|_| {
            ApiError::invalid(format!(
                "{entry}Gateway: invalid gateway {text}: expected an IPv6 address of {subnet}"
            ))
        })
    });
    let aux = aux_addresses(config.aux_address.as_ref(), entry, "IPv6")?;
    Ok(Ipam6Config { subnet: Some(subnet), gateway: gateway.transpose()?, aux })
}

fn ipam_config(
    config: &wire::IpamConfigRequest,
    subnet: Option<Ipv4Net>,
    entry: &str,
) -> ApiResult<IpamConfig> {
    let range = range(config.ip_range.as_deref(), entry)?;
    let gateway = match config.gateway.as_deref() {
        None | Some("") => None,
        Some(text) => Some(text.parse::<Ipv4Addr>().map_err(|_| {
            ApiError::invalid(format!(
                "{entry}Gateway: invalid gateway {text}: expected an IPv4 address of the subnet"
            ))
        })?),
    };
    let aux = aux_addresses(config.aux_address.as_ref(), entry, "IPv4")?;
    if subnet.is_none() && (range.is_some() || gateway.is_some() || !aux.is_empty()) {
        return Err(ApiError::invalid(format!(
            "{entry}Subnet: missing: --ip-range, --gateway and --aux-address need a --subnet to be in"
        )));
    }
    if let (Some(subnet), Some(range)) = (subnet, range)
        && !subnet.contains(&range)
    {
        return Err(ApiError::invalid(format!(
            "{entry}IPRange: ipam configuration: subnet {subnet} does not contain range {range}"
        )));
    }
    if let (Some(subnet), Some(gateway)) = (subnet, gateway)
        && (!subnet.contains(&gateway) || gateway == subnet.network() || gateway == subnet.broadcast())
    {
        return Err(ApiError::invalid(format!(
            "{entry}Gateway: ipam configuration: subnet {subnet} does not contain gateway {gateway} as a host"
        )));
    }
    let config = IpamConfig { subnet, range, gateway, aux };
    if !has_room(&config) {
        return Err(ApiError::invalid(format!(
            "{entry}IPRange: no address is left for tasks beside the gateway and the auxiliary addresses: give a \
             larger --ip-range, or fewer of --aux-address"
        )));
    }
    Ok(config)
}

/// The addresses of one family that nobody is given.
fn aux_addresses<A: FromStr>(
    texts: Option<&BTreeMap<String, String>>,
    entry: &str,
    family: &str,
) -> ApiResult<BTreeMap<String, A>> {
    let addresses = texts.into_iter().flatten().map(|(name, text)| {
        let addr = text.parse().map_err(|_| {
            ApiError::invalid(format!(
                "{entry}AuxiliaryAddresses: invalid address {text} ({name}): expected an {family} address of the \
                 subnet (--aux-address {name}=ADDRESS)"
            ))
        });
        Ok((name.clone(), addr?))
    });
    addresses.collect()
}

fn range(text: Option<&str>, entry: &str) -> ApiResult<Option<Ipv4Net>> {
    let field = format!("{entry}IPRange");
    match subnet(text, &field, "invalid range")? {
        None => Ok(None),
        Some(IpNet::V4(range)) => Ok(Some(range)),
        Some(IpNet::V6(range)) => Err(ApiError::invalid(format!(
            "{field}: invalid range {range}: the subnet that it is for is IPv4"
        ))),
    }
}

fn subnet(text: Option<&str>, field: &str, problem: &str) -> ApiResult<Option<IpNet>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.parse::<IpNet>() {
        Ok(subnet) if subnet.addr() != subnet.network() => {
            Err(ApiError::invalid(format!("{field}: {problem} {text}: it should be {}", subnet.trunc())))
        }
        Ok(subnet) => Ok(Some(subnet)),
        Err(_) => Err(ApiError::invalid(format!(
            "{field}: {problem} {text}: expected one such as 10.20.0.0/24 or fd00:20::/64"
        ))),
    }
}
