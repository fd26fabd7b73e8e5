(** When a linear steer at block_out can replace one at mlp_out

    The block output is h = x + y: skip part x in col(S), MLP part y in col(M).

    Claims.
      - If col(S) and col(M) meet only at 0, then for every linear steer A y at
        mlp_out there is B with rank(B) <= rank(A) and B (x + y) = A y for all x, y.
        It is B = A Q, with Q the projector onto col(M) along col(S).
      - An affine steer A y + b carries over with the same b.
      - The other projector, P onto col(S) along col(M), answers for the wrong part:
        A P (x + y) = A x.  (The blog post behind the paper defines that one.)
      - If they share a vector v with A v different from 0, no function of x + y at
        all equals A y when x and y vary freely over the two subspaces.

    Assumptions.  Any field.  The subspaces are given by spanning matrices.

    Not said here.  Q can have a large norm (one over the sine of the smallest
    angle between the subspaces).  With enough tokens the two spans of a real model
    fill the space and the first claim is empty; residual_covariance.v gives the
    best linear replacement in that case. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Match.
Variables (F : fieldType) (d p q : nat).
Variables (S : 'M[F]_(d, p)) (M : 'M[F]_(d, q)).
Implicit Types (x y v : 'cV[F]_d) (A B : 'M[F]_d).

(** col(S) and col(M) meet only at 0. *)
Definition independent := (S^T :&: M^T)%MS == 0.

(** Q: the projector onto col(M) along col(S). *)
Definition mlp_part : 'M[F]_d := (proj_mx <<M^T>>%MS <<S^T>>%MS)^T.

(** The same independence, in the form the projector lemmas ask for. *)
Lemma independentP : independent -> (<<M^T>> :&: <<S^T>>)%MS = 0.
Proof.
move=> /eqP SM0; apply/eqP; rewrite -submx0.
by rewrite (cap_eqmx (genmxE _) (genmxE _)) capmxC SM0.
Qed.

(** Q y = y for y in col(M). *)
Lemma mlp_part_id y : independent -> in_colspan y M -> mlp_part *m y = y.
Proof.
move=> /independentP SM0 yM; apply: trmx_inj.
by rewrite trmx_mul trmxK proj_mx_id ?genmxE.
Qed.

(** Q x = 0 for x in col(S). *)
Lemma mlp_part_skip x : independent -> in_colspan x S -> mlp_part *m x = 0.
Proof.
move=> /independentP SM0 xS; apply: trmx_inj.
by rewrite trmx_mul trmxK trmx0 proj_mx_0 ?genmxE.
Qed.

(** P: the projector onto col(S) along col(M). *)
Definition skip_part : 'M[F]_d := (proj_mx <<S^T>>%MS <<M^T>>%MS)^T.

(** A P (x + y) = A x: the projector onto the skip part replaces nothing. *)
Theorem skip_projector_answers_skip A x y : independent ->
  in_colspan x S -> in_colspan y M -> A *m skip_part *m (x + y) = A *m x.
Proof.
move=> /independentP SM0 xS yM; have MS0 : (<<S^T>> :&: <<M^T>>)%MS = 0.
  by apply/eqP; rewrite -submx0 capmxC SM0.
rewrite -mulmxA mulmxDr; congr (_ *m _).
have -> : skip_part *m x = x.
  by apply: trmx_inj; rewrite trmx_mul trmxK proj_mx_id ?genmxE.
have -> : skip_part *m y = 0.
  by apply: trmx_inj; rewrite trmx_mul trmxK trmx0 proj_mx_0 ?genmxE.
by rewrite addr0.
Qed.

(** Independent subspaces: B = A Q satisfies B (x + y) = A y and rank(B) <= rank(A). *)
Theorem block_out_replicates_linear A : independent ->
  exists B, (\rank B <= \rank A)%N
    /\ forall x y, in_colspan x S -> in_colspan y M -> B *m (x + y) = A *m y.
Proof.
move=> SM; exists (A *m mlp_part); split; first exact: mxrankM_maxl.
move=> x y xS yM; rewrite -mulmxA mulmxDr.
by rewrite mlp_part_skip // mlp_part_id // add0r.
Qed.

(** The steered block outputs agree: x + y + (B (x + y) + b) = x + (y + (A y + b)). *)
Theorem block_out_replicates_affine A b : independent ->
  exists B, (\rank B <= \rank A)%N /\ forall x y, in_colspan x S -> in_colspan y M ->
    x + y + (B *m (x + y) + b) = x + (y + (A *m y + b)).
Proof.
case/(block_out_replicates_linear A)=> B [rB E]; exists B; split=> // x y xS yM.
by rewrite E // addrA.
Qed.

(** A common direction v with A v <> 0 defeats every function of x + y. *)
Theorem no_replication_if_dependent A v :
    in_colspan v S -> in_colspan v M -> A *m v != 0 ->
  ~ exists f : 'cV[F]_d -> 'cV[F]_d, forall x y,
      in_colspan x S -> in_colspan y M -> f (x + y) = A *m y.
Proof.
have z0 k (N : 'M[F]_(d, k)) : in_colspan (0 : 'cV_d) N.
  by apply/colspanP; exists 0; rewrite mulmx0.
move=> vS vM /eqP Av0 [f E]; apply: Av0.
by rewrite -(E 0 v) ?z0 // add0r -[v in f v]addr0 (E v 0) ?z0 // mulmx0.
Qed.
End Match.
