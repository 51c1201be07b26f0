// Compiles src/ into artifacts/, one file per contract in Hardhat's shape. Same sources, same bytes: the compiler is
// pinned by package.json, and its metadata trailer (which would carry a hash of the paths) is left out.
//
//   npm install --ignore-scripts && node compile.mjs           writes the artifacts
//   npm install --ignore-scripts && node compile.mjs --check   fails when the written ones are not what the sources give
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import solc from "solc";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const CONTRACTS = ["DstackApp", "DstackKms", "ERC1967Proxy"];
const names = readdirSync(here("src")).filter((name) => name.endsWith(".sol")).sort();
const output = JSON.parse(
  solc.compile(
    JSON.stringify({
      language: "Solidity",
      sources: Object.fromEntries(names.map((name) => [name, { content: readFileSync(here(`src/${name}`), "utf8") }])),
      settings: {
        evmVersion: "shanghai",
        metadata: { appendCBOR: false, bytecodeHash: "none" },
        optimizer: { enabled: true, runs: 200 },
        outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"] } },
      },
    }),
  ),
);
const complaints = output.errors ?? [];
complaints.forEach((complaint) => process.stderr.write(complaint.formattedMessage));
if (complaints.length > 0) process.exit(1);

let stale = 0;
for (const name of CONTRACTS) {
  const { abi, evm } = output.contracts[`${name}.sol`][name];
  const artifact = {
    contractName: name,
    sourceName: `src/${name}.sol`,
    compiler: solc.version(),
    abi,
    bytecode: `0x${evm.bytecode.object}`,
    deployedBytecode: `0x${evm.deployedBytecode.object}`,
  };
  const path = here(`artifacts/${name}.json`);
  const text = `${JSON.stringify(artifact, null, 2)}\n`;
  if (!process.argv.includes("--check")) writeFileSync(path, text);
  else if (readFileSync(path, "utf8") !== text) {
    process.stderr.write(`artifacts/${name}.json is not what src/ compiles to\n`);
    stale = 1;
  }
}
process.exit(stale);
