//! V1: the MessagePack layout (§4.4). Named maps; any key order, unknown keys skipped, repeated ones refused.

use super::Error;
use super::model::{
    Attestation, PcrValue, PlatformEvidence, RuntimeEvent, Stack, TdxEvent, TdxEvidence, TpmEvent,
    TpmPlatform, TpmQuote,
};
use super::msgpack::{Once, Reader, Writer};

pub(super) fn decode(bytes: &[u8]) -> Result<Attestation, Error> {
    let mut reader = Reader::new(bytes);
    let (mut version, mut platform, mut stack) =
        (Once::new("version"), Once::new("platform"), Once::new("stack"));
    reader.map("attestation", |reader, key| match key {
        "version" => version.set(reader.uint("version")?),
        "platform" => platform.set(tagged(reader, "platform", platform_data)?),
        "stack" => stack.set(tagged(reader, "stack", stack_data)?),
        _ => Ok(false),
    })?;
    reader.end()?;
    match version.required()? {
        1 => {}
        actual => return Err(Error::UnsupportedVersion { what: "version", actual }),
    }
    let platform = platform.required()?;
    let stack = stack.required()?;
    Ok(Attestation { platform, ..stack })
}

/// Reads `{kind, data}`. The data may come before the kind, so it is read in a second pass over the same bytes.
fn tagged<'a, T>(
    reader: &mut Reader<'a>,
    what: &'static str,
    data: impl FnOnce(&mut Reader<'a>, &str) -> Result<T, Error>,
) -> Result<T, Error> {
    let (mut kind, mut content) = (Once::new("kind"), Once::new("data"));
    reader.map(what, |reader, key| match key {
        "kind" => kind.set(reader.string("kind")?),
        "data" => content.set(reader.skipped(what)?),
        _ => Ok(false),
    })?;
    data(&mut content.required()?, &kind.required()?)
}

fn platform_data(reader: &mut Reader<'_>, kind: &str) -> Result<PlatformEvidence, Error> {
    let (mut quote, mut event_log, mut tpm) =
        (Once::new("quote"), Once::new("event_log"), Once::new("tpm_quote"));
    let (mut nsm_quote, mut doc) = (Once::new("nsm_quote"), Once::new("attestation_doc"));
    let (mut report, mut chain, mut mr_config) =
        (Once::new("report"), Once::new("cert_chain"), Once::new("mr_config"));
    let is_tdx = matches!(kind, "tdx" | "gcp-tdx");
    reader.map("platform.data", |reader, key| match key {
        "quote" if is_tdx => quote.set(reader.bytes("quote")?),
        "event_log" if is_tdx => event_log.set(reader.list("event_log", tdx_event)?),
        "tpm_quote" if kind == "gcp-tdx" => tpm.set(tpm_quote(reader)?),
        "nsm_quote" if kind == "nitro-enclave" => nsm_quote.set(reader.bytes("nsm_quote")?),
        "attestation_doc" if kind == "aws-nitro-tpm" => doc.set(reader.bytes("attestation_doc")?),
        "report" if kind == "sev-snp" => report.set(reader.bytes("report")?),
        "cert_chain" if kind == "sev-snp" => {
            chain.set(reader.list("cert_chain", |reader| reader.bytes("cert_chain"))?)
        }
        "mr_config" if kind == "sev-snp" => mr_config.set(reader.string("mr_config")?),
        _ => Ok(false),
    })?;
    match kind {
        "tdx" => Ok(PlatformEvidence::Tdx(TdxEvidence {
            quote: quote.required()?,
            event_log: event_log.required()?,
        })),
        "gcp-tdx" => {
            let tdx = TdxEvidence { quote: quote.required()?, event_log: event_log.required()? };
            Ok(PlatformEvidence::GcpTdx(tdx, tpm.required()?))
        }
        "nitro-enclave" => Ok(PlatformEvidence::NitroEnclave { nsm_quote: nsm_quote.required()? }),
        "aws-nitro-tpm" => Ok(PlatformEvidence::AwsNitroTpm { attestation_doc: doc.required()? }),
        "sev-snp" => Ok(PlatformEvidence::SevSnp {
            report: report.required()?,
            cert_chain: chain.required()?,
            mr_config: mr_config.required()?,
        }),
        _ => Err(Error::UnknownName { what: "platform.kind" }),
    }
}

/// The stack's part. Its platform is a placeholder that [`decode`] replaces.
fn stack_data(reader: &mut Reader<'_>, kind: &str) -> Result<Attestation, Error> {
    let (mut report_data, mut config) = (Once::new("report_data"), Once::new("config"));
    let (mut events, mut payload) = (Once::new("runtime_events"), Once::new("report_data_payload"));
    reader.map("stack.data", |reader, key| match key {
        "report_data" => report_data.set(reader.bytes("report_data")?),
        "runtime_events" => events.set(reader.list("runtime_events", runtime_event)?),
        "config" => config.set(reader.string("config")?),
        "report_data_payload" if kind == "dstack-pod" => payload.set(reader.string("report_data_payload")?),
        _ => Ok(false),
    })?;
    let stack = match kind {
        "dstack" => Stack::Dstack,
        "dstack-pod" => Stack::DstackPod { report_data_payload: payload.required()? },
        _ => return Err(Error::UnknownName { what: "stack.kind" }),
    };
    let report_data = report_data.required()?;
    Ok(Attestation {
        platform: PlatformEvidence::NitroEnclave { nsm_quote: Vec::new() },
        runtime_events: events.required()?,
        report_data: report_data
            .as_slice()
            .try_into()
            .map_err(|_| Error::ReportDataLength(report_data.len()))?,
        config: config.required()?,
        stack,
    })
}

fn runtime_event(reader: &mut Reader<'_>) -> Result<RuntimeEvent, Error> {
    let (mut event, mut payload, mut version) =
        (Once::new("event"), Once::new("payload"), Once::new("version"));
    reader.map("runtime_events", |reader, key| match key {
        "event" => event.set(reader.string("event")?),
        "payload" => payload.set(reader.bytes("payload")?),
        "version" => version.set(reader.uint("version")?),
        _ => Ok(false),
    })?;
    let version = match version.optional() {
        None | Some(1) => 1,
        Some(2) => 2,
        Some(actual) => return Err(Error::UnsupportedVersion { what: "event version", actual }),
    };
    Ok(RuntimeEvent { event: event.required()?, payload: payload.required()?, version })
}

fn tdx_event(reader: &mut Reader<'_>) -> Result<TdxEvent, Error> {
    let (mut imr, mut event_type, mut digest) =
        (Once::new("imr"), Once::new("event_type"), Once::new("digest"));
    let (mut event, mut payload) = (Once::new("event"), Once::new("event_payload"));
    reader.map("event_log", |reader, key| match key {
        "imr" => imr.set(reader.u32("imr")?),
        "event_type" => event_type.set(reader.u32("event_type")?),
        "digest" => digest.set(reader.bytes("digest")?),
        "event" => event.set(reader.string("event")?),
        "event_payload" => payload.set(reader.bytes("event_payload")?),
        _ => Ok(false),
    })?;
    Ok(TdxEvent {
        imr: imr.required()?,
        event_type: event_type.required()?,
        // The only field upstream lets be absent.
        digest: digest.optional().unwrap_or_default(),
        event: event.required()?,
        event_payload: payload.required()?,
    })
}

fn tpm_quote(reader: &mut Reader<'_>) -> Result<TpmQuote, Error> {
    let (mut message, mut signature, mut ak_cert) =
        (Once::new("message"), Once::new("signature"), Once::new("ak_cert"));
    let (mut pcrs, mut platform, mut log) =
        (Once::new("pcr_values"), Once::new("platform"), Once::new("event_log"));
    reader.map("tpm_quote", |reader, key| match key {
        "message" => message.set(reader.bytes("message")?),
        "signature" => signature.set(reader.bytes("signature")?),
        "pcr_values" => pcrs.set(reader.list("pcr_values", pcr_value)?),
        "ak_cert" => ak_cert.set(reader.bytes("ak_cert")?),
        "platform" => platform.set(tpm_platform(reader.str("platform")?)?),
        "event_log" => log.set(reader.list("event_log", tpm_event)?),
        _ => Ok(false),
    })?;
    Ok(TpmQuote {
        message: message.required()?,
        signature: signature.required()?,
        pcr_values: pcrs.required()?,
        ak_cert: ak_cert.required()?,
        platform: platform.required()?,
        event_log: log.required()?,
    })
}

fn pcr_value(reader: &mut Reader<'_>) -> Result<PcrValue, Error> {
    let (mut index, mut algorithm, mut value) =
        (Once::new("index"), Once::new("algorithm"), Once::new("value"));
    reader.map("pcr_values", |reader, key| match key {
        "index" => index.set(reader.u32("index")?),
        "algorithm" => algorithm.set(reader.string("algorithm")?),
        "value" => value.set(reader.bytes("value")?),
        _ => Ok(false),
    })?;
    Ok(PcrValue { index: index.required()?, algorithm: algorithm.required()?, value: value.required()? })
}

fn tpm_event(reader: &mut Reader<'_>) -> Result<TpmEvent, Error> {
    let (mut pcr_index, mut digest) = (Once::new("pcr_index"), Once::new("digest"));
    reader.map("event_log", |reader, key| match key {
        "pcr_index" => pcr_index.set(reader.u32("pcr_index")?),
        "digest" => digest.set(reader.bytes("digest")?),
        _ => Ok(false),
    })?;
    Ok(TpmEvent { pcr_index: pcr_index.required()?, digest: digest.required()? })
}

fn tpm_platform(name: &str) -> Result<TpmPlatform, Error> {
    [TpmPlatform::Dstack, TpmPlatform::Gcp, TpmPlatform::NitroEnclave, TpmPlatform::AwsEc2]
        .into_iter()
        .find(|platform| tpm_platform_name(*platform) == name)
        .ok_or(Error::UnknownName { what: "platform" })
}

fn tpm_platform_name(platform: TpmPlatform) -> &'static str {
    match platform {
        TpmPlatform::Dstack => "dstack",
        TpmPlatform::Gcp => "gcp",
        TpmPlatform::NitroEnclave => "nitroenclave",
        TpmPlatform::AwsEc2 => "aws-ec2",
    }
}

pub(super) fn encode(attestation: &Attestation) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.map(3);
    writer.str("version");
    writer.u32(1);
    writer.str("platform");
    writer.map(2);
    writer.str("kind");
    writer.str(attestation.platform.kind());
    writer.str("data");
    write_platform(&mut writer, &attestation.platform);
    writer.str("stack");
    write_stack(&mut writer, attestation);
    writer.out
}

fn write_platform(writer: &mut Writer, platform: &PlatformEvidence) {
    match platform {
        PlatformEvidence::Tdx(tdx) => {
            writer.map(2);
            write_tdx(writer, tdx);
        }
        PlatformEvidence::GcpTdx(tdx, tpm_quote) => {
            writer.map(3);
            write_tdx(writer, tdx);
            writer.str("tpm_quote");
            write_tpm_quote(writer, tpm_quote);
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => {
            writer.map(1);
            writer.str("nsm_quote");
            writer.numbers(nsm_quote);
        }
        PlatformEvidence::AwsNitroTpm { attestation_doc } => {
            writer.map(1);
            writer.str("attestation_doc");
            writer.numbers(attestation_doc);
        }
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            writer.map(3);
            writer.str("report");
            writer.numbers(report);
            writer.str("cert_chain");
            writer.array(cert_chain.len());
            cert_chain.iter().for_each(|der| writer.numbers(der));
            writer.str("mr_config");
            writer.str(mr_config);
        }
    }
}

fn write_tdx(writer: &mut Writer, tdx: &TdxEvidence) {
    writer.str("quote");
    writer.numbers(&tdx.quote);
    writer.str("event_log");
    writer.array(tdx.event_log.len());
    for event in &tdx.event_log {
        writer.map(5);
        writer.str("imr");
        writer.u32(event.imr);
        writer.str("event_type");
        writer.u32(event.event_type);
        writer.str("digest");
        writer.bin(&event.digest);
        writer.str("event");
        writer.str(&event.event);
        writer.str("event_payload");
        writer.bin(&event.event_payload);
    }
}

fn write_tpm_quote(writer: &mut Writer, quote: &TpmQuote) {
    writer.map(6);
    writer.str("message");
    writer.bin(&quote.message);
    writer.str("signature");
    writer.bin(&quote.signature);
    writer.str("pcr_values");
    writer.array(quote.pcr_values.len());
    for pcr in &quote.pcr_values {
        writer.map(3);
        writer.str("index");
        writer.u32(pcr.index);
        writer.str("algorithm");
        writer.str(&pcr.algorithm);
        writer.str("value");
        writer.bin(&pcr.value);
    }
    writer.str("ak_cert");
    writer.bin(&quote.ak_cert);
    writer.str("platform");
    writer.str(tpm_platform_name(quote.platform));
    writer.str("event_log");
    writer.array(quote.event_log.len());
    for event in &quote.event_log {
        writer.map(2);
        writer.str("pcr_index");
        writer.u32(event.pcr_index);
        writer.str("digest");
        writer.bin(&event.digest);
    }
}

fn write_stack(writer: &mut Writer, attestation: &Attestation) {
    let payload = match &attestation.stack {
        Stack::Dstack => None,
        Stack::DstackPod { report_data_payload } => Some(report_data_payload),
    };
    writer.map(2);
    writer.str("kind");
    writer.str(if payload.is_some() { "dstack-pod" } else { "dstack" });
    writer.str("data");
    writer.map(if payload.is_some() { 4 } else { 3 });
    writer.str("report_data");
    writer.numbers(&attestation.report_data);
    writer.str("runtime_events");
    writer.array(attestation.runtime_events.len());
    for event in &attestation.runtime_events {
        writer.map(if event.version == 1 { 2 } else { 3 });
        writer.str("event");
        writer.str(&event.event);
        writer.str("payload");
        writer.bin(&event.payload);
        if event.version != 1 {
            writer.str("version");
            writer.u32(u32::from(event.version));
        }
    }
    writer.str("config");
    writer.str(&attestation.config);
    if let Some(payload) = payload {
        writer.str("report_data_payload");
        writer.str(payload);
    }
}
