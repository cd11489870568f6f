// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "command_line.hpp"

#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <thread>

#include <CLI/CLI.hpp>

#include "pipeline_settings.hpp"

namespace train_lm {
namespace {

/// Ranks that a mesh with a stated dp_shard has, 0 for others.
int ranks_of(const std::string& text) {
  const ts::mesh axes = ts::mesh::parse(text);
  const int shard = axes.find("dp_shard"), replicate = axes.find("dp_replicate");
  if (shard < 0) return 0;
  return axes.size(shard) * (replicate < 0 ? 1 : axes.size(replicate));
}

}  // namespace

std::optional<settings> read_command_line(int argc, char** argv, int processes, bool speaks, int& exit_code) {
  settings s;
  CLI::App app{
      "Trains a byte-level mixture-of-experts language model on real text, its experts spread over several ranks,\n"
      "and measures it against an order-2 model and a general compressor on the same split.\n",
      "train_lm"};
  app.footer(
      "\nRanks are threads of this process, or the processes of mpirun:\n"
      "  train_lm --ranks 4 --balance none loss bias\n"
      "  mpirun -n 4 train_lm --data my/folder/of/text\n"
      "With --combine ordered the same seed gives the same loss, bit for bit, for every number of ranks and every "
      "mesh,\nof pipelines with one rank at each place.\n"
      "\nA run that was killed goes on from its last checkpoint, on more or fewer ranks and with another mesh:\n"
      "  train_lm --mesh dp_shard=4,ep=2 --checkpoint saved\n"
      "  train_lm --mesh dp_replicate=2,dp_shard=1 --checkpoint saved --resume\n"
      "\nWritten to the output folder, per run: metrics.csv, load.csv, loss.svg, load.svg, sample.txt; with several\n"
      "--balance a folder for each, and comparison.svg.\n"
      "Ctrl-C finishes the step on all ranks, writes everything and exits with 130; a second one ends at once. mpirun\n"
      "kills its processes a second after Ctrl-C: then metrics.csv and load.csv are there, the rest may not be.\n"
      "Exit codes: 0 done, 1 an error that is explained, 130 stopped.");
  app.get_formatter()->column_width(34);
  app.option_defaults()->always_capture_default()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);

  const std::map<std::string, balance_kind> balance_names{
      {"none", balance_kind::none}, {"loss", balance_kind::loss}, {"bias", balance_kind::bias}};
  const std::map<std::string, combine_kind> combine_names{{"ordered", combine_kind::ordered},
                                                          {"reduced", combine_kind::reduced}};

  const char* data = "Text";
  app.add_option("--data", s.data, "Text files or folders (default: the Debian system's licence and copyright files)")
      ->group(data)
      ->type_name("PATH")
      ->take_all()
      ->default_str("");
  app.add_option("--output,-o", s.output, "Folder for everything that is written")->group(data)->type_name("DIR");
  app.add_option("--sample", s.sample_bytes, "Bytes of text to generate at the end")->group(data)->type_name("BYTES");
  app.add_option("--prompt", s.prompt, "What the generated text begins with")->group(data)->type_name("TEXT");
  app.add_option("--temperature", s.temperature, "Of the generated text")->group(data)->type_name("T");

  const char* experts = "Experts";
  app.add_option("--ranks,-r", s.ranks, "Ranks that the experts are spread over (default: cores, at most 4)")
      ->group(experts)
      ->type_name("N")
      ->default_str("");
  app.add_option("--balance", s.balances, "none, loss, bias: one run each, compared if several")
      ->group(experts)
      ->type_name("KIND")
      ->take_all()
      ->default_str("bias")
      ->transform(CLI::CheckedTransformer(balance_names, CLI::ignore_case).description(""));
  app.add_option("--combine", s.combine, "ordered (bits do not depend on the ranks) or reduced (fewer bytes travel)")
      ->group(experts)
      ->type_name("KIND")
      ->default_str("ordered")
      ->transform(CLI::CheckedTransformer(combine_names, CLI::ignore_case).description(""));
  app.add_option("--experts,-E", s.experts, "Experts of each layer")->group(experts)->type_name("E");
  app.add_option("--top-k,-K", s.top_k, "Experts of each token")->group(experts)->type_name("K");
  app.add_option("--intermediate", s.intermediate, "Width of an expert")->group(experts)->type_name("n");
  app.add_option("--bias-rate", s.bias_rate, "Step of the selection bias")->group(experts)->type_name("RATE");
  app.add_option("--loss-coefficient", s.loss_coefficient, "Of the auxiliary loss")->group(experts)->type_name("C");

  app.add_option("--mesh", s.mesh,
                 "dp_replicate=A,dp_shard=B,ep=C: copies, ranks that divide each, and how many of these divide the "
                 "experts (default: dp_shard and ep are --ranks)")
      ->group(experts)
      ->type_name("AXES")
      ->default_str("");

  const char* kept = "Checkpoints";
  app.add_option("--checkpoint", s.checkpoint, "Folder to save checkpoints in")
      ->group(kept)
      ->type_name("DIR")
      ->default_str("");
  app.add_option("--checkpoint-every", s.checkpoint_every, "Steps between checkpoints (0: one at the end)")
      ->group(kept)
      ->type_name("N");
  app.add_option("--keep", s.keep, "Newest checkpoints that are kept (0: all)")->group(kept)->type_name("K");
  app.add_flag("--resume", s.resume, "Go on from the newest checkpoint, with any --ranks and --mesh")->group(kept);

  const char* model = "Model and training";
  app.add_option("--hidden", s.hidden, "Width of a token")->group(model)->type_name("d");
  app.add_option("--layers", s.layers, "Blocks of mixer and experts")->group(model)->type_name("L");
  app.add_option("--seq-len", s.length, "Bytes of a sequence")->group(model)->type_name("BYTES");
  app.add_option("--batch", s.batch, "Sequences of a step over all ranks, a multiple of 12")
      ->group(model)
      ->type_name("N");
  app.add_option("--steps", s.steps, "Optimizer steps")->group(model)->type_name("N");
  app.add_option("--lr", s.rate, "Peak learning rate of AdamW")->group(model)->type_name("RATE");
  app.add_option("--weight-decay", s.adam.weight_decay, "Of AdamW")->group(model)->type_name("W");
  app.add_option("--seed", s.seed, "Of initial values and of the sample")->group(model)->type_name("N");
  app.add_option("--eval-every", s.eval_every, "Steps between validations (0: only at the end)")
      ->group(model)
      ->type_name("N");

  const char* pipeline = "Pipeline and multi-token prediction";
  app.add_option("--pipeline", s.pipeline, "Schedule over stages of layers: 1f1b, zb1p, dualpipe or dualpipev")
      ->group(pipeline)
      ->type_name("KIND")
      ->default_str("");
  app.add_option("--stages", s.stages, "Stages that the layers are spread over")->group(pipeline)->type_name("P");
  app.add_option("--micro-batches", s.micro_batches,
                 "Micro-batches of a step (0: 12, which gives the bits of a run without a pipeline)")
      ->group(pipeline)
      ->type_name("M");
  app.add_option("--mtp", s.mtp, "Further bytes to predict, each by a small model of its own (0: none)")
      ->group(pipeline)
      ->type_name("D");
  app.add_option("--mtp-weight", s.mtp_weights, "Of their loss, for two thirds of the run and for the rest")
      ->group(pipeline)
      ->type_name("W [W]")
      ->expected(1, 2)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->default_str("0.3 0.1");

  bool no_plots = false, no_baselines = false;
  const char* other = "Other";
  app.add_flag("--quiet,-q", s.quiet, "No progress, only results")->group(other);
  app.add_flag("--no-plots", no_plots, "Do not call gnuplot")->group(other);
  app.add_flag("--no-baselines", no_baselines, "Neither order-2 model nor compressor")->group(other);
  app.set_help_flag("--help,-h", "This text")->group(other);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    std::ostringstream silence;
    const int code = speaks ? app.exit(e) : app.exit(e, silence, silence);
    exit_code = code == 0 ? 0 : 1;
    return std::nullopt;
  }
  s.plots = !no_plots;
  s.baselines = !no_baselines;
  if (processes > 0) {
    TESSERA_EXPECTS(s.ranks == 0 || s.ranks == processes, "--ranks " << s.ranks
                                                                     << " contradicts mpirun, which has started "
                                                                     << processes << " processes: leave --ranks out");
    s.ranks = processes;
  }
  prepare_pipeline(s);
  if (s.ranks == 0) s.ranks = ranks_of(s.mesh);
  if (s.ranks == 0) s.ranks = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 4u));
  validate(s);
  return s;
}

}  // namespace train_lm
