(** For a small change of the logits the KL divergence is half a variance

    Claim.  Let p = softmax z, m = sum_i p_i δ_i and
      V = sum_i p_i (δ_i - m)^2 = δ^T (diag p - p p^T) δ ,
    the variance of the change δ under p.  If |δ_i - m| <= c <= 1 for all i, then
      (1 - c) V/2  <=  KL(softmax z ‖ softmax(z + δ))  <=  (1 + c) V/2 .
    For δ = s g with |g_i - m| <= c and s c <= 1, V the variance of g,
      (1 - s c) s^2 V/2  <=  KL  <=  (1 + s c) s^2 V/2 .
    So the ratio of KL and its second-order form tends to 1 with s, and the orders of
    kl_order.v are attained: 2 by logits that move by t g, 4 by logits that differ by
    t^2 g, unless all entries of g are equal.

    Assumptions.  As stated; constants added to all logits change nothing, hence only
    the distance from the mean counts.

    Not said here.  For the constant of the fourth order (a steer exact to first order)
    δ is the second-order difference of the logits; put it in here. *)
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics real_numbers exp_quadratic kl_bound.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section KlQuadratic.
Variable n : nat.
Implicit Types (z d : 'I_n.+1 -> R).

(** V = sum_i p_i (δ_i - m)^2, p = softmax z, m the mean of δ under p. *)
Definition variance z d := \sum_i softmax z i * (d i - mean z d) ^+ 2.

(** V = δ^T (diag p - p p^T) δ, written out: sum_i p_i δ_i^2 - m^2. *)
Theorem variance_fisher z d :
  variance z d = \sum_i softmax z i * d i ^+ 2 - mean z d ^+ 2.
Proof.
have E i : softmax z i * (d i - mean z d) ^+ 2
  = softmax z i * d i ^+ 2 - (softmax z i * d i * mean z d) *+ 2
    + softmax z i * mean z d ^+ 2.
  by rewrite sqrrB mulrDr mulrBr mulrnAr (mulrA _ (d i) (mean z d)).
rewrite /variance (eq_bigr _ (fun i _ => E i)) big_split sumrB /= sumrMnl.
rewrite -[X in _ - X *+ 2]mulr_suml -[X in _ + X = _]mulr_suml.
rewrite softmax_sum mul1r -/(mean z d) -expr2 -addrA; congr (_ + _).
by rewrite mulr2n opprD addrNK.
Qed.

(** E exp(δ) = exp(m) E exp(δ - m) *)
Lemma mean_exp_shift z d (m : R) :
  mean_exp z d = exp m * mean_exp z (fun i => d i - m).
Proof.
rewrite /mean_exp mulr_sumr; apply: eq_bigr => i _.
have E : exp (m + (d i - m)) = exp m * exp (d i - m) by rewrite expRD.
by rewrite mulrCA -E addrCA subrr addr0.
Qed.

(** (1 - c) V/2 <= KL <= (1 + c) V/2 when |δ_i - m| <= c <= 1. *)
Theorem kl_quadratic z d (c : R) : c <= 1 -> (forall i, `|d i - mean z d| <= c) ->
  variance z d / 2%:R * (1 - c)
    <= kl (softmax z) (softmax (fun i => z i + d i))
    <= variance z d / 2%:R * (1 + c).
Proof.
move=> c1 dc; set e := fun i => d i - mean z d.
have c0 : 0 <= c by exact: le_trans (normr_ge0 _) (dc ord0).
have p0 i := ltW (softmax_gt0 z i).
have e0 : \sum_i softmax z i * e i = 0.
  under eq_bigr do rewrite mulrBr.
  by rewrite sumrB -mulr_suml softmax_sum mul1r subrr.
have VE : variance z d = \sum_i softmax z i * (e i * e i).
  by apply: eq_bigr => i _; rewrite expr2.
have -> : kl (softmax z) (softmax (fun i => z i + d i)) = ln (mean_exp z e).
  rewrite kl_softmax (mean_exp_shift z d (mean z d)).
  by rewrite lnM ?exp_gt0 ?mean_exp_gt0 // ln_exp addrC addKr.
have ec : forall i, `|e i| <= c := dc; clearbody e.
have V0 : 0 <= variance z d.
  by rewrite VE sumr_ge0 // => i _; rewrite mulr_ge0 // -expr2 sqr_ge0.
have Vc : variance z d <= c * c.
  rewrite VE -[c * c]mul1r -(softmax_sum z) mulr_suml ler_sum // => i _.
  rewrite le_mul2l // -[e i * e i]ger0_norm -?expr2 ?sqr_ge0 // normrX expr2.
  by apply: le_mul => //; exact: ec.
have parabola (k : R) : 1 + k * variance z d
    = \sum_i softmax z i * (1 + e i + k * (e i * e i)).
  under [RHS]eq_bigr do rewrite !mulrDr mulr1 (mulrCA _ k).
  by rewrite !big_split /= softmax_sum e0 addr0 -mulr_sumr -VE.
have expE i := exp_quadratic _ _ (elimT (RleP _ _) (ec i)) (elimT (RleP _ _) c1).
have E1 := parabola (Rdiv (Rminus 1 (Rdiv c 3)) 2).
have E2 := parabola (Rdiv (Rplus 1 c) 2).
have L : 1 + Rdiv (Rminus 1 (Rdiv c 3)) 2 * variance z d <= mean_exp z e.
  rewrite E1; apply: ler_sum => i _; rewrite le_mul2l //.
  by apply/RleP; case: (expE i).
have U : mean_exp z e <= 1 + Rdiv (Rplus 1 c) 2 * variance z d.
  rewrite E2; apply: ler_sum => i _; rewrite le_mul2l //.
  by apply/RleP; case: (expE i).
have [lo up] := @ln_quadratic (variance z d) c (mean_exp z e)
  (conj (elimT (RleP _ _) c0) (elimT (RleP _ _) c1))
  (conj (elimT (RleP _ _) V0) (elimT (RleP _ _) Vc))
  (conj (elimT (RleP _ _) L) (elimT (RleP _ _) U)).
by rewrite div_natrE; apply/andP; split; apply/RleP.
Qed.

(** The same for δ = s g, with the variance of g: KL is s^2 V/2 up to a factor 1 ± s c. *)
Theorem kl_scaled z g (s c : R) : 0 <= s -> s * c <= 1 ->
    (forall i, `|g i - mean z g| <= c) ->
  s ^+ 2 * variance z g / 2%:R * (1 - s * c)
    <= kl (softmax z) (softmax (fun i => z i + s * g i))
    <= s ^+ 2 * variance z g / 2%:R * (1 + s * c).
Proof.
move=> s0 sc gc; have mE : mean z (fun i => s * g i) = s * mean z g.
  by rewrite [RHS]mulr_sumr; apply: eq_bigr => i _; rewrite mulrCA.
have -> : s ^+ 2 * variance z g = variance z (fun i => s * g i).
  rewrite /variance mE mulr_sumr; apply: eq_bigr => i _.
  by rewrite -mulrBr exprMn mulrCA.
apply: kl_quadratic => // i; rewrite mE -mulrBr normrM ger0_norm //.
exact: le_mul2l.
Qed.

End KlQuadratic.
